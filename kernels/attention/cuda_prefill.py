"""Causal attention of prompt chunks over a paged KV cache, for Hopper: `prefill.cu`, the counterpart of
`triton_prefill`."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, can_run_hopper_kernels, tensor_map

# T tokens, N query heads, K KV heads, H head dim, Z tiles of queries
# B blocks of the pool, P tokens per block, C = 2 K planes of a block, W blocks per row of the block table

_SOURCE = Path(__file__).with_name("prefill.cu")
_TILE = 128
_LOG2_E = math.log2(math.e)


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("table", ctypes.c_void_p), ("tiles", ctypes.c_void_p), ("out", ctypes.c_void_p), ("scale", ctypes.c_float),
        ("table_stride", ctypes.c_int), ("num_tiles", ctypes.c_int), ("N", ctypes.c_int), ("K", ctypes.c_int),
        ("block_shift", ctypes.c_int), ("box_rows", ctypes.c_int), ("cache_rows", ctypes.c_int),
        ("window", ctypes.c_int),
    ]  # fmt: skip


@cache
def _kernel(head_dim: int, cluster: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        shared_bytes = 6 * _TILE * head_dim * 2 + 1024 + 128
        return Kernel.load(
            _SOURCE, "prefill", dtype, threads=384, shared_bytes=shared_bytes, H=head_dim, CLUSTER=cluster
        )


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fits(q_TNH: Tensor, cache_BCPH: Tensor) -> bool:
    """Whether the kernel is for this device, type, head dim and number of tokens per block."""
    P, H = cache_BCPH.shape[2:]
    return (
        can_run_hopper_kernels(q_TNH.device)
        and q_TNH.dtype == cache_BCPH.dtype
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and H in (64, 128)
        and P >= 8
        and P & (P - 1) == 0
    )


def prefill_attention(
    q_TNH: Tensor,
    cache_BCPH: Tensor,
    table_RW: Tensor,
    tiles_Z4: Tensor,
    out_TNH: Tensor,
    *,
    scale: float,
    window: int | None = None,
    cluster: int = 1,
) -> None:
    """See `triton_prefill.prefill_attention`; the tiles are those of `tiles.tile_queries`.

    TFLOP/s with 32 + 8 heads of 128, blocks of 32 / 64 tokens (H100, 2026-11-27): 4 x 2,048 tokens 520 / 550, 8,192
    600 / 627, 16 x 1,000 397 / 430, 2,048 after 6,144 591 / 628; cuDNN, which cannot read a paged prefix and plans each
    new shape for 50 to 75 ms: 520, 605, 424 (8 x 1,000).

    Args:
        cluster: heads, 1 or 2, that share what they read; 2: for an even number of query heads per KV head.
    """
    T, N, H = q_TNH.shape
    B, C, P, _ = cache_BCPH.shape
    K = C // 2
    assert fits(q_TNH, cache_BCPH)
    assert cache_BCPH.is_contiguous()
    assert out_TNH.is_contiguous()
    assert q_TNH.stride()[1:] == (H, 1)
    assert tiles_Z4.is_contiguous()
    assert cluster == 1 or N // K % 2 == 0
    if not len(tiles_Z4):
        return
    box_rows, cache_rows = min(P, 64), B * C * P
    assert cache_rows < 2**31
    arguments = _Arguments(
        table_RW.data_ptr(), tiles_Z4.data_ptr(), out_TNH.data_ptr(), scale * _LOG2_E, table_RW.stride(0),
        len(tiles_Z4), N, K, P.bit_length() - 1, box_rows, cache_rows, 2**30 if window is None else window,
    )  # fmt: skip
    addresses = (ctypes.c_void_p * 4)(
        tensor_map(q_TNH, (N * H, T), (q_TNH.stride(0),), (64, 64)),
        tensor_map(cache_BCPH, (H, cache_rows), (H,), (64, box_rows)),
        tensor_map(out_TNH, (N * H, T), (N * H,), (64, 64)),
        ctypes.addressof(arguments),
    )
    items = len(tiles_Z4) * N // cluster
    programs = cluster * min(_num_multiprocessors(q_TNH.device) // cluster, items)
    _kernel(H, cluster, q_TNH.dtype, q_TNH.device).launch((programs, 1), addresses)
