"""Rows of activations in 8-bit floats (e4m3) for products with a `QuantizedWeight`: what kernels share, and a kernel.

A row's scale is its largest magnitude over e4m3's largest number, as in `kernels.weights.quantize_rows`. Kernels that
make rows for a product of few rows leave them in bfloat16 beside their *peaks*: int32 [M, A], bits of float32, whose
largest in a row is that row's largest magnitude. The product quantizes what it reads, so that no kernel stands between.
Peaks are raised by atomic maxima: they must be zero before the kernel that makes the rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensorweave.kernels.linear.quantized import QuantizedRows

# M rows, K columns, A peaks per row

PEAKS_PER_ROW = 16  # so that hundreds of blocks do not wait for one address
_OVER_LARGEST = tl.constexpr(1 / 448)  # e4m3's largest number
_TINY = tl.constexpr(1.1754943508222875e-38)  # float32's smallest normal number


@triton.jit
def row_scale(peak):
    return tl.maximum(peak * _OVER_LARGEST, _TINY)


@triton.jit
def load_peaks(ptr, mask=None):
    bits = tl.load(ptr, mask=mask, other=0 if mask is not None else None, cache_modifier=".cg")
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_row_scales(peaks_ptr, m, M, A: tl.constexpr):
    """Scales of rows m, and 1 / them."""
    at = m[:, None] * A + tl.arange(0, A)[None, :]
    scales = row_scale(tl.max(load_peaks(peaks_ptr + at, (m < M)[:, None] & (at >= 0)), 1))
    return scales, tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)


@triton.jit
def raise_peaks(peaks_ptr, at, magnitudes, mask):
    """Floats that are not negative are ordered as the integers of their bits are."""
    tl.atomic_max(peaks_ptr + at, magnitudes.to(tl.int32, bitcast=True), mask=mask, sem="relaxed")


@triton.jit
def _quantize(
    x_ptr, out_ptr, scales_ptr, x_stride, K: tl.constexpr, KP: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    scale = row_scale(tl.max(tl.abs(x), 0))
    tl.store(out_ptr + row * K + k, (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv), mask=k < K)
    tl.store(scales_ptr + row, scale)


def make_peaks(*shape: int, device: torch.device) -> Tensor:
    """Zeros [*shape, A], for the rows that one or several products read."""
    return torch.zeros(*shape, PEAKS_PER_ROW, dtype=torch.int32, device=device)


def quantize(x_MK: Tensor, out: QuantizedRows, *, pdl: bool = False) -> None:
    """out = `kernels.weights.quantize_rows(x)`, with equal bits."""
    M, K = x_MK.shape
    assert out.values_MK.is_contiguous()
    assert x_MK.stride(1) == 1
    if not M:
        return
    KP = triton.next_power_of_2(K)
    _quantize[(M,)](
        x_MK, out.values_MK, out.scales_M, x_MK.stride(0),
        K=K, KP=KP, PDL=pdl, num_warps=min(16, max(1, KP // 512)), launch_pdl=pdl,
    )  # fmt: skip
