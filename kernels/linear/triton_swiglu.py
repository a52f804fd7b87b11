"""The gated half of an MLP for many rows: silu(x gateᵀ) * (x upᵀ), the activation in the product's epilogue."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from tensorweave.kernels.linear.quantized import QuantizedRows, UnscaledProduct
from tensorweave.kernels.linear.triton_quantize import row_scale

# M rows, I intermediate width, K inputs; blocks of BM, BN, BK

_BM, _BN, _BK, _STAGES, _WARPS = 128, 256, 64, 3, 8
# Of a row that goes to 8 bits: 8,192 rows of 14,336 take 222 µs with all at once, 294 with 2,048 (H100, 2026-11-27).
_GATED_AT_ONCE = 16384
_TILES_PER_GROUP = 16  # tiles of rows that share what they read of the weight


@triton.jit(do_not_specialize=["M"])
def _swiglu_linear(
    x_desc, w_desc, out_desc, M,
    WIDTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(2 * WIDTH, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        rows = tl.minimum(tiles_m - first, GROUP)
        at_m = (first + tile % (GROUP * tiles_n) % rows) * BM
        at_n = tile % (GROUP * tiles_n) // rows * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc = tl.dot(x_desc.load([at_m, k]), w_desc.load([at_n, k]).T, acc)
        gate, up = tl.split(acc.reshape(BM, BN // 2, 2))  # neighbours, in one thread: no exchange
        out_desc.store([at_m, at_n // 2], (gate / (1 + tl.exp(-gate)) * up).to(out_desc.dtype))


@triton.jit
def _gate(x_ptr, out_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    both_at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    both = tl.load(x_ptr + both_at, mask=both_at < 2 * count, other=0.0)
    gate, up = tl.split(both.to(tl.float32).reshape(BLOCK, 2))
    tl.store(out_ptr + at, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit
def _gated(
    x_ptr, scales_ptr, row_scale, start, n, WIDTH: tl.constexpr, UNSCALED: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Columns [start, start + n) of a row of gates and ups, rounded to `dtype` as a product's epilogue rounds them."""
    at = 2 * start + tl.arange(0, 2 * n)
    both = tl.load(x_ptr + at, mask=at < 2 * WIDTH, other=0.0).to(tl.float32)
    if UNSCALED:
        both *= tl.load(scales_ptr + at, mask=at < 2 * WIDTH, other=0.0) * row_scale
    gate, up = tl.split(both.reshape(n, 2))
    return (gate / (1 + tl.exp(-gate)) * up).to(dtype).to(tl.float32)


@triton.jit
def _gate_rows(
    x_ptr, row_scales_ptr, scales_ptr, out_ptr, out_scales_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNSCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Parts of a row wider than BLOCK are read twice, for the row's largest magnitude and for the numbers."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_ptr += row * 2 * WIDTH
    factor = tl.load(row_scales_ptr + row) if UNSCALED else 1.0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    peaks = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        gated = _gated(x_ptr, scales_ptr, factor, start, BLOCK, WIDTH, UNSCALED, dtype)
        peaks = tl.maximum(peaks, tl.abs(gated))
    scale = row_scale(tl.max(peaks, 0))
    inverse = tl.div_rn(1.0, scale)
    for start in tl.static_range(0, WIDTH, BLOCK):
        if BLOCK < WIDTH:
            gated = _gated(x_ptr, scales_ptr, factor, start, BLOCK, WIDTH, UNSCALED, dtype)
        i = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + row * WIDTH + i, (gated * inverse).to(tl.float8e4nv), mask=i < WIDTH)
    tl.store(out_scales_ptr + row, scale)


def swiglu_linear(x_MK: Tensor, weight_2IK: Tensor, out_MI: Tensor) -> None:
    """silu(x gateᵀ) * (x upᵀ), bfloat16 with float32 sums; rows of the weight alternate gate and up.

    Alternating rows put a gate and its up into one thread; as two halves of the weight with two accumulators, 536
    rather than 690 to 737 TFLOP/s (8,192 x 28,672 x 4,096, H100, 2026-11-26). All contiguous, at 16 bytes.
    """
    M, K = x_MK.shape
    I = out_MI.shape[1]  # noqa: E741
    assert weight_2IK.shape == (2 * I, K)
    assert x_MK.is_contiguous()
    assert weight_2IK.is_contiguous()
    assert out_MI.is_contiguous()
    if not M:
        return
    programs = torch.cuda.get_device_properties(x_MK.device).multi_processor_count
    _swiglu_linear[(min(programs, triton.cdiv(M, _BM) * triton.cdiv(2 * I, _BN)),)](
        TensorDescriptor.from_tensor(x_MK, [_BM, _BK]),
        TensorDescriptor.from_tensor(weight_2IK, [_BN, _BK]),
        TensorDescriptor.from_tensor(out_MI, [_BM, _BN // 2]),
        M, WIDTH=I, K=K, BM=_BM, BN=_BN, BK=_BK, GROUP=_TILES_PER_GROUP, STAGES=_STAGES,
        PROGRAMS=programs, num_warps=_WARPS,
    )  # fmt: skip


def silu_mul_pairs(
    gate_up: Tensor | UnscaledProduct,
    out: Tensor | QuantizedRows,
    *,
    pdl: bool = False,
) -> None:
    """silu(gate) * up where the product was another library's: columns alternate gate and up. Contiguous.

    [M, 2 I] to [M, I]. An `UnscaledProduct` goes to `QuantizedRows`.
    """
    if isinstance(out, QuantizedRows):
        _silu_mul_quantized(gate_up, out, pdl)
        return
    assert isinstance(gate_up, Tensor)
    assert gate_up.is_contiguous()
    assert out.is_contiguous()
    assert gate_up.numel() == 2 * out.numel()
    if not out.numel():
        return
    BLOCK = 1024
    _gate[(triton.cdiv(out.numel(), BLOCK),)](
        gate_up, out, out.numel(), BLOCK=BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl
    )


def _silu_mul_quantized(gate_up: Tensor | UnscaledProduct, out: QuantizedRows, pdl: bool) -> None:
    product = gate_up if isinstance(gate_up, UnscaledProduct) else None
    gate_up_M2I = gate_up.values_MN if isinstance(gate_up, UnscaledProduct) else gate_up
    factors = (None, None) if product is None else (product.row_scales_M, product.scales_N)
    M, I = out.values_MK.shape  # noqa: E741
    assert gate_up_M2I.shape == (M, 2 * I)
    assert gate_up_M2I.is_contiguous()
    if not M:
        return
    block = min(_GATED_AT_ONCE, triton.next_power_of_2(I))
    _gate_rows[(M,)](
        gate_up_M2I, *factors, out.values_MK, out.scales_M,
        WIDTH=I, BLOCK=block, UNSCALED=product is not None, PDL=pdl, num_warps=min(16, max(1, block // 256)),
        launch_pdl=pdl,
    )  # fmt: skip
