"""CUDA IPC: a pool on a GPU that another process of this machine can read. Mapped memory outlives its owner."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorweave.cluster.errors import WireError
from tensorweave.workers.transfer.window import PoolWindow


class CudaIpc:
    """Satisfies `PeerMemory`."""

    def share(self, window: PoolWindow) -> dict[str, Any]:
        """Shared once: torch counts the mappings."""
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
        }

    def map(self, handshake: dict[str, Any], window: PoolWindow) -> Tensor | None:
        """The pool is unmapped with the last tensor on it. The sender synchronizes before it offers a block, so there
        is no need for the event that torch would wait for."""
        if handshake.get("boot") != _boot_id():
            return None
        dtype = getattr(torch, handshake["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise WireError(f"{handshake['dtype']!r} is not a dtype")
        storage = torch.UntypedStorage._new_shared_cuda(
            window.device.index, handshake["handle"], *handshake["storage"], *handshake["counter"], b"", False
        )
        shape = torch.Size(handshake["shape"])
        if shape.numel() * dtype.itemsize > storage.nbytes():
            raise WireError("the sender's pool is smaller than its shape")
        pool: Tensor = torch.empty(0, dtype=dtype, device=window.device).set_(storage).view(shape)
        return pool


@functools.cache
def _boot_id() -> str:
    """Identifies this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
