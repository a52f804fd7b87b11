"""`open_peer_memory`: memory of each rank's GPU that all ranks of a host reach, by symmetric memory or CUDA IPC.

NVLink multicast is not used, nor set up.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

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
    for open_memory in (_open_symmetric, _open_by_ipc):
        memory = None
        try:
            memory = open_memory(comm, num_bytes, device, limit_s)
        except RuntimeError as error:
            logger.warning("rank %d: no GPU memory shared with others: %s", comm.rank, str(error).splitlines()[0])
        if comm.agree_min(int(memory is not None)):
            return memory
    return None


def _is_one_host(comm: GroupComm) -> bool:
    """Ranks in containers of one host count as one if torch can hand descriptors over between them, which it tells."""
    mine = _BOOT_ID.read_bytes() if _BOOT_ID.is_file() else b""
    leader = comm.agree(mine if comm.rank == 0 else None)
    return bool(comm.agree_min(int(mine == leader and mine != b"")))


def _open_symmetric(comm: GroupComm, num_bytes: int, device: torch.device, limit_s: float) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric

    os.environ[_EACH_SEES_ITS_OWN] = "1"
    group = dist.group.WORLD
    assert group is not None
    memory_E = _allocate(comm, lambda: symmetric.empty(num_bytes, dtype=torch.uint8, device=device))
    with comm.store_exchanging():
        handle = symmetric.rendezvous(memory_E, group)
    memory_E.zero_()
    torch.cuda.synchronize(device)
    addresses = [handle.get_buffer(rank, (num_bytes,), torch.uint8).data_ptr() for rank in range(comm.size)]
    return PeerMemory(memory_E, addresses, comm.rank, limit_s)


def _allocate(comm: GroupComm, allocate: Callable[[], Tensor]) -> Tensor:
    """Raises RuntimeError on every rank if one of them has no such memory: nobody then waits for it in a rendezvous."""
    memory_E, reason = None, "another rank has none"
    try:
        memory_E = allocate()
    except RuntimeError as error:
        reason = str(error)
    if not comm.agree_min(int(memory_E is not None)) or memory_E is None:
        raise RuntimeError(reason)
    return memory_E


def _open_by_ipc(comm: GroupComm, num_bytes: int, device: torch.device, limit_s: float) -> PeerMemory:
    """Open the peers' memory by CUDA IPC, where torch has no symmetric memory."""
    memory_E = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    shared = memory_E.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    _, handle, storage_bytes, storage_offset, counter_handle, counter_offset, _, _ = shared
    mine = msgpack.packb([handle, storage_bytes, storage_offset, counter_handle, counter_offset])
    addresses, mapped = [], []
    for rank, packed in enumerate(comm.exchange(mine)):
        if rank == comm.rank:
            addresses.append(memory_E.data_ptr())
            continue
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *msgpack.unpackb(packed), b"", False)
        mapped.append(storage)
        addresses.append(storage.data_ptr())
    return PeerMemory(memory_E, addresses, comm.rank, limit_s, mapped)
