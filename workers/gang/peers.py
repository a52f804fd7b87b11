"""`open_peer_memory`: memory of each rank's GPU that all ranks of a host reach, by torch's symmetric memory.

NVLink multicast is not used, nor set up.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from tensorweave.kernels.ranks.peer_memory import PeerMemory
from tensorweave.workers.gang.comm import Comm, GroupComm

logger = logging.getLogger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_EACH_SEES_ITS_OWN: Final = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Read by torch: ranks that each see one GPU all call it the first. It also spares the multicast objects."""


def open_peer_memory(comm: Comm, num_bytes: int, device: torch.device, limit_s: float) -> PeerMemory | None:
    """Every rank calls it. None on every rank if they are on several hosts, or if the GPUs cannot reach each other.

    Args:
        limit_s: how long a kernel waits for another rank.
    """
    if not isinstance(comm, GroupComm) or not _is_one_host(comm):
        return None
    memory = None
    try:
        memory = _open(comm, num_bytes, device, limit_s)
    except RuntimeError as error:
        logger.warning("rank %d shares no GPU memory with the others: %s", comm.rank, str(error).splitlines()[0])
    return memory if comm.agree_min(int(memory is not None)) else None


def _is_one_host(comm: GroupComm) -> bool:
    """Ranks in containers of one host count as one if torch can hand descriptors over between them, which it tells."""
    mine = _BOOT_ID.read_bytes() if _BOOT_ID.is_file() else b""
    leader = comm.agree(mine if comm.rank == 0 else None)
    return bool(comm.agree_min(int(mine == leader and mine != b"")))


def _open(comm: GroupComm, num_bytes: int, device: torch.device, limit_s: float) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric

    os.environ[_EACH_SEES_ITS_OWN] = "1"
    group = dist.group.WORLD
    assert group is not None
    with comm.rendezvous_open():
        memory_E = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(memory_E, group)
    memory_E.zero_()
    torch.cuda.synchronize(device)
    addresses = [handle.get_buffer(rank, (num_bytes,), torch.uint8).data_ptr() for rank in range(comm.size)]
    return PeerMemory(memory_E, addresses, comm.rank, limit_s)
