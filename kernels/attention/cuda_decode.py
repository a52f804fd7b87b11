"""Attention of one new token per sequence over an 8-bit cache, on Hopper: `decode.cu`, a form of
`triton_decode.decode_attention`."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, can_run_hopper_kernels, pointer
from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.linear.triton_quantize import PEAKS_PER_ROW
from tensorweave.kernels.weights import FP8

# R rows (sequences), N query heads, K KV heads, X = N + 2 K, H head dim
# B blocks of the pool, P tokens per block, C = 2 K planes of a block, W blocks per row of the block table

_SOURCE: Final = Path(__file__).with_name("decode.cu")
_HEAD_DIM: Final = 128
_MAX_GROUP: Final = 8
_MIN_BLOCK: Final = 4
_KEYS, _STAGES = 32, 3
"""Keys per step of a ring of so many: within 6 % of the best of 32 or 64 keys and 2 to 4 stages in each case."""
_LOG2_E: Final = math.log2(math.e)


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("heads", "out", "cache", "table", "slots", "lengths", "rope")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm", "peaks")),
        ("scale", ctypes.c_float), ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("row_stride", "table_stride", "window")),
        *((name, ctypes.c_int) for name in ("K", "G", "block_shift", "peaks_per_row")),
    ]  # fmt: skip


def fits(heads_RXH: Tensor, cache_BCPH: Tensor, num_heads: int) -> bool:
    """Whether the kernel is for these shapes, types and device."""
    _, C, P, H = cache_BCPH.shape
    return (
        can_run_hopper_kernels(heads_RXH.device)
        and heads_RXH.dtype in (torch.bfloat16, torch.float16)
        and cache_BCPH.dtype == FP8
        and H == _HEAD_DIM
        and num_heads // (C // 2) <= _MAX_GROUP
        and P >= _MIN_BLOCK
        and P & (P - 1) == 0
    )


@cache
def _kernel(is_normed: bool, has_peaks: bool, dtype: torch.dtype, device: torch.device) -> Kernel:
    ring_bytes = _STAGES * _KEYS * 2 * _HEAD_DIM
    constants = {"NORM": is_normed, "PEAKS": has_peaks, "BN": _KEYS, "STAGES": _STAGES}
    with torch.cuda.device(device):
        return Kernel.load(_SOURCE, "decode", dtype, threads=32, shared_bytes=ring_bytes + 128, **constants)


def decode_attention(
    heads_RXH: Tensor,
    cache_BCPH: Tensor,
    table_RW: Tensor,
    lengths_R: Tensor,
    out_RNH: Tensor,
    *,
    scale: float,
    rotation: HeadRotation | None,
    window: int | None = None,
    slots_R: Tensor | None = None,
    peaks_RA: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """See `triton_decode.decode_attention`; keys of a row are not split.

    With 32 + 8 heads of 128 and blocks of 32 (H100, 2026-11-27; Triton's in parentheses): 450 rows of 1,000 to 2,000
    keys 480 µs (537), 300 x 1,500 313 (364), 256 x 200 46 (63), 32 x 8,192 218 (314).
    """
    R, N, H = out_RNH.shape
    _, C, P, _ = cache_BCPH.shape
    assert fits(heads_RXH, cache_BCPH, N)
    assert rotation is not None
    assert cache_BCPH.is_contiguous()
    assert out_RNH.is_contiguous()
    assert heads_RXH.stride()[1:] == (H, 1)
    assert table_RW.stride(1) == 1
    if not R:
        return
    arguments = _Arguments(
        heads_RXH.data_ptr(), out_RNH.data_ptr(), cache_BCPH.data_ptr(), table_RW.data_ptr(), pointer(slots_R),
        lengths_R.data_ptr(), rotation.table_LH.data_ptr(), pointer(rotation.query_norm_H),
        pointer(rotation.key_norm_H), pointer(peaks_RA), scale * _LOG2_E, rotation.epsilon, heads_RXH.stride(0),
        table_RW.stride(0), 2**30 if window is None else window, C // 2, N // (C // 2), P.bit_length() - 1,
        PEAKS_PER_ROW,
    )  # fmt: skip
    kernel = _kernel(rotation.query_norm_H is not None, peaks_RA is not None, heads_RXH.dtype, heads_RXH.device)
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    kernel.launch((C // 2, R), addresses, pdl=pdl)
