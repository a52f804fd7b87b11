"""KV blocks copied from pool to pool with digests on the way, on Hopper: `pull.cu`, a form of
`reference.pull_blocks`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.blocks.digest import plane_constants
from tensorweave.kernels.blocks.reference import SomeBlocks
from tensorweave.kernels.cuda.program import Kernel, can_run_hopper_kernels

_SOURCE: Final = Path(__file__).with_name("pull.cu")
_THREADS: Final = 320
_ROW_BYTES: Final = 4096
_MIN_PLANE_BYTES, _MAX_PLANE_BYTES = 512, 32 << 10
_MAX_SUMS: Final = 8
_MAX_RUN_BYTES: Final = 64 << 10
_MAX_SLOT_BYTES: Final = 16 << 10
_RING_BYTES: Final = 192 << 10
_MAX_STAGES: Final = 32
_MOST_BLOCKS: Final = 256
"""Of one launch: their ids are among the kernel's parameters, which are at most 4 KiB."""

_Ids = ctypes.c_int * _MOST_BLOCKS


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "target", "constants", "digests")),
        *((f"source_{name}", ctypes.c_longlong) for name in ("layer", "block", "half")),
        *((f"target_{name}", ctypes.c_longlong) for name in ("layer", "block", "half")),
        *((name, ctypes.c_int) for name in ("blocks", "layers", "groups")),
        ("source_ids", _Ids), ("target_ids", _Ids), ("valid", _Ids),
    ]  # fmt: skip


def fits(source_LB2KPH: Tensor, target_LB2KPH: Tensor) -> bool:
    """Whether the kernel is for these pools and the device of the target."""
    P, H = target_LB2KPH.shape[-2:]
    plane_bytes = P * H * target_LB2KPH.itemsize
    is_whole = plane_bytes % _ROW_BYTES == 0 or _ROW_BYTES % max(plane_bytes, 1) == 0
    return (
        can_run_hopper_kernels(target_LB2KPH.device)
        and is_whole
        and _MIN_PLANE_BYTES <= plane_bytes <= _MAX_PLANE_BYTES
        and H * target_LB2KPH.itemsize % 8 == 0
        and all(
            pool.stride()[3:] == (P * H, H, 1) and pool.data_ptr() % 16 == 0 for pool in (source_LB2KPH, target_LB2KPH)
        )
    )


def heads_of_unit(num_heads: int, plane_bytes: int) -> int:
    """How many heads the kernel takes at once: as many as its registers hold sums for, and a divisor of all."""
    row_planes = max(1, _ROW_BYTES // plane_bytes)
    most = min(_MAX_SUMS * row_planes, _MAX_RUN_BYTES // plane_bytes)
    return next(heads for heads in range(min(most, num_heads), 0, -1) if num_heads % heads == 0)


def compile_constants(heads: int, plane_bytes: int) -> dict[str, int]:
    """What the source is compiled for."""
    slot = min(heads * plane_bytes, _MAX_SLOT_BYTES)
    return {"PLANE": plane_bytes, "HEADS": heads, "SLOT": slot, "STAGES": min(_MAX_STAGES, _RING_BYTES // slot)}


@cache
def _kernel(heads: int, plane_bytes: int, device: torch.device) -> Kernel:
    constants = compile_constants(heads, plane_bytes)
    shared_bytes = constants["STAGES"] * constants["SLOT"]
    with torch.cuda.device(device):
        return Kernel.load(_SOURCE, "pull", torch.bfloat16, threads=_THREADS, shared_bytes=shared_bytes, **constants)


@cache
def _constants(plane_bytes: int, device: torch.device) -> Tensor:
    return torch.from_numpy(plane_constants(plane_bytes // 8)).to(device)


def pull_blocks(
    source: SomeBlocks, target: SomeBlocks, num_tokens: Sequence[int], digests_NLK: Tensor, num_sms: int
) -> None:
    """See `reference.pull_blocks`; on the current stream, on at most `num_sms` multiprocessors. The kernel writes
    `digests_NLK`, on the target's device or page-locked on the host."""
    L, _, _, _, P, H = target.pool_LB2KPH.shape
    size, num_heads = target.pool_LB2KPH.itemsize, len(target.heads)
    plane_bytes, device = P * H * size, target.pool_LB2KPH.device
    assert fits(source.pool_LB2KPH, target.pool_LB2KPH)
    assert digests_NLK.shape == (len(target.block_ids), L, num_heads)
    assert digests_NLK.is_contiguous()
    heads = heads_of_unit(num_heads, plane_bytes)
    kernel = _kernel(heads, plane_bytes, device)
    strides = [stride * size for each in (source, target) for stride in each.pool_LB2KPH.stride()[:3]]
    for first in range(0, len(target.block_ids), _MOST_BLOCKS):
        ids = slice(first, first + _MOST_BLOCKS)
        chosen = target.block_ids[ids]
        arguments = _Arguments(
            source.pool_LB2KPH.data_ptr() + source.heads.start * plane_bytes,
            target.pool_LB2KPH.data_ptr() + target.heads.start * plane_bytes,
            _constants(plane_bytes, device).data_ptr(), digests_NLK[first:].data_ptr(), *strides,
            len(chosen), L, num_heads // heads,
            _Ids(*source.block_ids[ids]), _Ids(*chosen), _Ids(*(count * H * size for count in num_tokens[ids])),
        )  # fmt: skip
        grid = min(num_sms, len(chosen) * L * (num_heads // heads))
        with torch.cuda.device(device):
            kernel.launch((grid,), (ctypes.c_void_p * 1)(ctypes.addressof(arguments)))
