"""`SameNodeTransport`: the taker reads the giver's KV pool itself, over NVLink or PCIe, by CUDA IPC.

The giver sends block numbers; the taker, which has the giver's pool mapped, gathers those blocks into its own GPU's
memory in one kernel. Nobody writes into another's memory. The giver does not know when a read is over, so a block may
have been given to someone else meanwhile: its digest then differs, as with any other fault. Memory that is mapped here
outlives its owner: after a kill the read in flight ends, and the mapping goes with the connection.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import WireError
from tensorweave.kernels.blocks.pack import pack_blocks
from tensorweave.workers.transfer.carrier import Claim
from tensorweave.workers.transfer.transports.frame_connection import Stream, tensor_bytes
from tensorweave.workers.transfer.transports.loader import Loader
from tensorweave.workers.transfer.transports.transport import GivingTransport, TakingTransport
from tensorweave.workers.transfer.window import PoolWindow

MESSAGE_BYTES: Final = 64 << 20
_NAME_BYTES: Final = 8


class SameNodeTransport:
    """Satisfies `TransportKind`, for pools on GPUs."""

    name = "ipc"

    def __init__(self, window: PoolWindow, message_bytes: int = MESSAGE_BYTES) -> None:
        assert window.device.type == "cuda"
        self._window = window
        self._message_bytes = message_bytes
        self._greeting: dict[str, Any] | None = None

    def giving(self) -> GivingTransport:
        if self._greeting is None:
            self._greeting = _share(self._window)
        return _SameNodeGiving(self._window, self._greeting, self._message_bytes)

    def taking(self) -> TakingTransport:
        return _SameNodeTaking(self._window)


class NameLoader:
    """Payloads are the numbers of the blocks, in host memory."""

    def __init__(self, window: PoolWindow, message_bytes: int) -> None:
        self._window = window
        self._message_bytes = message_bytes

    def block_bytes(self, num_heads: int) -> int:
        return _NAME_BYTES

    def message_blocks(self, num_heads: int) -> int:
        return max(1, self._message_bytes // max(1, self._window.block_bytes(num_heads)))

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        out.numpy().view("<i8")[:] = block_ids


class _SameNodeGiving:
    def __init__(self, window: PoolWindow, greeting: dict[str, Any], message_bytes: int) -> None:
        self.loader: Loader = NameLoader(window, message_bytes)
        self._window = window
        self._greeting = greeting
        self._stream: Stream | None = None

    def greeting(self) -> dict[str, Any]:
        return self._greeting

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def ship(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._stream is not None
        self._stream.send(name, *fields, body=tensor_bytes(payload))

    def probe(self, num_bytes: int) -> None:
        """Any blocks will do: they are read, and thrown away."""
        num_blocks = min(-(-num_bytes // self._window.block_bytes(len(self._window.heads))), self._window.num_blocks)
        names = self.staging(num_blocks * _NAME_BYTES)
        self.loader.pack(range(num_blocks), self._window.heads, names)
        self.ship(names, "probe")

    def close(self) -> None:
        return None


class _SameNodeTaking:
    def __init__(self, window: PoolWindow) -> None:
        self._device = window.device
        self._pool_LB2KPH: Tensor | None = None
        self._first_head = 0
        self._staging = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def fits(self, greeting: dict[str, Any]) -> bool:
        if greeting.get("boot") != _boot_id():
            return False
        try:
            self._pool_LB2KPH = _open(greeting, self._device)
            self._first_head = int(greeting["first_head"])
            probe = self._gather([0], range(1))
            self._arrived.synchronize()
        except (RuntimeError, KeyError, TypeError, ValueError):  # no peer access, this very process, another namespace
            self._pool_LB2KPH = None
            return False
        return len(probe) > 0

    def open(self, stream: Stream) -> None:
        return None

    def land(self, body: Tensor, claim: Claim | None) -> Tensor:
        pool = self._pool_LB2KPH
        assert pool is not None
        block_ids = body.numpy().view("<i8").tolist() if len(body) % _NAME_BYTES == 0 else [-1]
        heads = range(pool.shape[3])
        if claim is not None:
            heads = range(claim.first_head - self._first_head, claim.first_head - self._first_head + claim.num_heads)
        if not (0 <= heads.start <= heads.stop <= pool.shape[3]):
            raise WireError("these heads are not the giver's")
        if any(not 0 <= block_id < pool.shape[1] for block_id in block_ids):
            raise WireError("these blocks are not the giver's")
        payload = self._gather(block_ids, heads)
        self._arrived.synchronize()
        return payload

    def close(self) -> None:
        self._pool_LB2KPH = None

    def _gather(self, block_ids: Sequence[int], heads: range) -> Tensor:
        pool = self._pool_LB2KPH
        assert pool is not None
        num_layers, _, _, _, P, H = pool.shape
        num_bytes = len(block_ids) * num_layers * 2 * len(heads) * P * H * pool.itemsize
        if num_bytes > len(self._staging):
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        payload = self._staging[:num_bytes]
        pack_blocks(pool, block_ids, heads, payload)
        self._arrived.record()
        return payload


def _share(window: PoolWindow) -> dict[str, Any]:
    """The pool's memory as another process of this machine can map it. Shared once: torch counts who has it."""
    pool = window.blocks_LB2KPH
    shared = pool.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    _, handle, storage_bytes, storage_offset, counter_handle, counter_offset, _, _ = shared
    return {
        "boot": _boot_id(),
        "handle": handle,
        "storage": [storage_bytes, storage_offset],
        "counter": [counter_handle, counter_offset],
        "dtype": str(pool.dtype).removeprefix("torch."),
        "shape": list(pool.shape),
        "first_head": window.heads.start,
    }


def _open(greeting: dict[str, Any], device: torch.device) -> Tensor:
    """The giver's pool, mapped for this GPU; unmapped with the last tensor on it. The giver synchronizes before it
    offers a block, so the event that torch would wait for is left out."""
    dtype = getattr(torch, greeting["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise WireError(f"{greeting['dtype']!r} is no dtype")
    storage = torch.UntypedStorage._new_shared_cuda(
        device.index, greeting["handle"], *greeting["storage"], *greeting["counter"], b"", False
    )
    shape = torch.Size(greeting["shape"])
    if shape.numel() * dtype.itemsize > storage.nbytes():
        raise WireError("the giver's pool is smaller than its shape")
    pool: Tensor = torch.empty(0, dtype=dtype, device=device).set_(storage).view(shape)
    return pool


@functools.cache
def _boot_id() -> str:
    """Names this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
