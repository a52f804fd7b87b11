"""Matrix products of many rows with what follows them, on Hopper: the counterpart of `triton_thin` for prompt chunks.

The norms are folded into the products as there. The kernel is in `wide.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, tensor_map
from tensorweave.kernels.linear.triton_thin import ResidualSum

# M rows of x, N outputs, K inputs, Q sums of squares per row of x, X heads, H head dim, L positions
# B blocks, P tokens per block, C planes of a block: keys of its heads, then their values

_SOURCE: Final = Path(__file__).with_name("wide.cu")
_PLAIN, _GATED, _RESIDUAL, _HEADS = 0, 1, 2, 3
_BM, _BN, _BK = 128, 256, 64
_CHUNK_BYTES: Final = 64 * 64 * 2
_STAGES: Final = {_PLAIN: 3, _GATED: 4, _RESIDUAL: 3, _HEADS: 3}
_CHUNKS: Final = {_PLAIN: 4, _GATED: 2, _RESIDUAL: 5, _HEADS: 4}
_GROUP_PAIRS: Final = 8


@dataclass(frozen=True, slots=True)
class PlacedHeads:
    """Where a product's result goes when it is the query, key and value heads of tokens.

    Queries and keys are rotated. Queries are written to `heads_MXH` (contiguous; its keys and values are left as they
    were), keys and values into the cache.

    Args:
        cache_BCPH: one layer's blocks, contiguous.
        slots_M: int32, block * P + offset of each token; -1: not stored.
        positions_M: int32.
        rope_LH: float32, a row per position: cosines of the H/2 angles, then their sines.
    """

    heads_MXH: Tensor
    cache_BCPH: Tensor
    slots_M: Tensor
    positions_M: Tensor
    rope_LH: Tensor


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("squares", ctypes.c_void_p), ("gain", ctypes.c_void_p), ("squares_out", ctypes.c_void_p),
        ("epsilon", ctypes.c_float), ("num_squares", ctypes.c_int),
        ("M", ctypes.c_int), ("N", ctypes.c_int), ("K", ctypes.c_int), ("group_pairs", ctypes.c_int),
        ("rope", ctypes.c_void_p), ("positions", ctypes.c_void_p), ("slots", ctypes.c_void_p),
        ("cache", ctypes.c_void_p), ("query_heads", ctypes.c_int), ("kv_heads", ctypes.c_int),
        ("block_shift", ctypes.c_int),
    ]  # fmt: skip


@cache
def _kernel(epilogue: int, is_scaled: bool, head_dim: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    shared_bytes = _STAGES[epilogue] * (_BM + _BN) * _BK * 2 + 2 * _CHUNKS[epilogue] * _CHUNK_BYTES + 1024 + 128
    constants = {"EPILOGUE": epilogue, "SCALED": int(is_scaled), "H": head_dim}
    with torch.cuda.device(device):
        return Kernel.load(_SOURCE, "wide", dtype, threads=384, shared_bytes=shared_bytes, **constants)


@cache
def _num_clusters(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count // 2


def num_wide_squares(num_outputs: int) -> int:
    """Sums of squares per row that a product with a `ResidualSum` writes."""
    return -(-num_outputs // _BN)


def wide_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    out: Tensor | ResidualSum | PlacedHeads,
    *,
    is_gated: bool = False,
    squares_MQ: Tensor | None = None,
    epsilon: float = 0.0,
    group_pairs: int = _GROUP_PAIRS,
) -> None:
    """out = x Wᵀ for many rows, bfloat16 or float16 with float32 sums. See `thin_linear`.

    Args:
        x_MK: contiguous, as all others; K a multiple of 8; with `squares_MQ`, the residual times the norm's gain.
        weight_NK: with `is_gated`, [2 N, K], whose rows alternate gate and up, N a multiple of 8.
        squares_MQ: float32 sums of squares of the residual whose sum over Q is that of the row; the result is
            multiplied by 1 / sqrt(mean + epsilon).
        group_pairs: pairs of tiles of 128 rows that share what they read of the weight.

    Equal bits for a row whatever the other rows are.
    """
    M, K = x_MK.shape
    rows = weight_NK.shape[0]
    assert x_MK.is_contiguous()
    assert weight_NK.is_contiguous()
    assert weight_NK.shape[1] == K
    if not M:
        return
    arguments = _Arguments(epsilon=epsilon, M=M, N=rows, K=K, group_pairs=group_pairs)
    head_dim = 128
    if isinstance(out, PlacedHeads):
        epilogue, result = _HEADS, out.heads_MXH.view(M, -1)
        head_dim = _place(out, arguments)
        w_map = _heads_map(weight_NK, head_dim)
    elif is_gated:
        assert isinstance(out, Tensor)
        assert rows % 16 == 0
        epilogue, result = _GATED, out
        w_map = tensor_map(weight_NK, (K, 8, 2, rows // 16), (2 * K, K, 16 * K), (_BK, 8, 2, _BN // 32))
    else:
        w_map = tensor_map(weight_NK, (K, rows), (K,), (_BK, _BN // 2))
        epilogue, result = (_PLAIN, out) if isinstance(out, Tensor) else (_RESIDUAL, out.residual_MN)
    assert result.is_contiguous()
    assert result.shape == (M, rows // 2 if is_gated else rows)
    out_map = gained_map = _result_map(result)
    if isinstance(out, ResidualSum):
        assert out.gained_MN.is_contiguous()
        assert out.squares_MQ.shape == (M, num_wide_squares(rows))
        gained_map = _result_map(out.gained_MN)
        arguments.gain, arguments.squares_out = out.gain_N.data_ptr(), out.squares_MQ.data_ptr()
    if squares_MQ is not None:
        arguments.squares, arguments.num_squares = squares_MQ.data_ptr(), squares_MQ.shape[1]
    x_map = tensor_map(x_MK, (K, M), (K,), (_BK, _BM))
    addresses = (ctypes.c_void_p * 5)(x_map, w_map, out_map, gained_map, ctypes.addressof(arguments))
    tiles = -(-M // (2 * _BM)) * -(-rows // _BN)
    kernel = _kernel(epilogue, squares_MQ is not None, head_dim, x_MK.dtype, x_MK.device)
    kernel.launch((2 * min(_num_clusters(x_MK.device), tiles), 1), addresses)


def _result_map(result_MN: Tensor) -> int:
    M, N = result_MN.shape
    return tensor_map(result_MN, (N, M), (N,), (64, 64))


def _heads_map(weight_NK: Tensor, head_dim: int) -> int:
    """Rows in the order in which a thread needs them: 8 of a head's left half, the 8 that are rotated with them."""
    N, K = weight_NK.shape
    shape = (K, 8, 2, head_dim // 16, N // head_dim)
    strides = (K, head_dim // 2 * K, 8 * K, head_dim * K)
    return tensor_map(weight_NK, shape, strides, (_BK, 8, 2, head_dim // 16, _BN // 2 // head_dim))


def _place(out: PlacedHeads, arguments: _Arguments) -> int:
    _, X, H = out.heads_MXH.shape
    _, C, P, _ = out.cache_BCPH.shape
    assert H in (64, 128)
    assert P & (P - 1) == 0
    assert out.cache_BCPH.is_contiguous()
    assert out.heads_MXH.is_contiguous()
    assert out.slots_M.dtype == out.positions_M.dtype == torch.int32
    arguments.rope, arguments.positions = out.rope_LH.data_ptr(), out.positions_M.data_ptr()
    arguments.slots, arguments.cache = out.slots_M.data_ptr(), out.cache_BCPH.data_ptr()
    arguments.query_heads, arguments.kv_heads, arguments.block_shift = X - C, C // 2, P.bit_length() - 1
    return H
