"""Residual addition and root-mean-square norm in one pass; the start of a step whose norms are folded into products.

`thin_linear` explains the folding: a product takes x * gain and the sums of squares, and multiplies by 1 / rms itself.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensorweave.kernels.linear.quantized import QuantizedRows, UnscaledProduct
from tensorweave.kernels.linear.triton_quantize import PEAKS_PER_ROW, raise_peaks, row_scale

# T tokens, D hidden size, V vocabulary, Q sums of squares per token, each of D / Q numbers, A peaks per token


@triton.jit
def _add_rms_norm(
    x_ptr, update_ptr, row_scales_ptr, scales_ptr, weight_ptr, out_ptr, out_scales_ptr, epsilon,
    D: tl.constexpr, DP: tl.constexpr, ADD: tl.constexpr, UNSCALED: tl.constexpr, QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    mask = d < D
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)  # does not change: before the wait
    if UNSCALED:
        scales = tl.load(scales_ptr + d, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(update_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
        if UNSCALED:
            update *= scales * tl.load(row_scales_ptr + row)
        x += update
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(x_ptr + row * D + d, x.to(x_ptr.dtype.element_ty), mask=mask)
    factor = tl.rsqrt(tl.sum(x * x, 0) / D + epsilon)
    if QUANTIZED:  # the same numbers as a product of few rows makes of the same x
        gained = (x * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
        scale = row_scale(tl.max(tl.abs(gained), 0))
        tl.store(out_ptr + row * D + d, (gained * tl.div_rn(1.0, scale)).to(tl.float8e4nv), mask=mask)
        tl.store(out_scales_ptr + row, scale * factor)
    else:
        tl.store(out_ptr + row * D + d, (x * factor * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _embed(
    tokens_ptr, table_ptr, gain_ptr, x_ptr, gained_ptr, squares_ptr, peaks_ptr,
    D: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, DQ: tl.constexpr, A: tl.constexpr, PEAKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, QP)
    i = tl.arange(0, DQ)
    at = q[:, None] * (D // Q) + i[None, :]
    mask = (q < Q)[:, None] & (i < D // Q)[None, :]
    gain = tl.load(gain_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.load(tokens_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + token * D + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * D + at, x.to(x_ptr.dtype.element_ty), mask=mask)
    gained = (x * gain).to(gained_ptr.dtype.element_ty)
    tl.store(gained_ptr + row * D + at, gained, mask=mask)
    tl.store(squares_ptr + row * Q + q, tl.sum(x * x, 1), mask=q < Q)
    if PEAKS:
        raise_peaks(peaks_ptr, row * A, tl.max(tl.max(tl.abs(gained.to(tl.float32)), 1), 0), None)


@triton.jit(do_not_specialize=["V", "first"])
def _embed_share(
    tokens_ptr, table_ptr, out_ptr, V, first, D: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.load(tokens_ptr + row).to(tl.int64) - first
    is_here = (token >= 0) & (token < V)
    x = tl.load(table_ptr + token * D + d, mask=is_here & (d < D), other=0.0)
    tl.store(out_ptr + row * D + d, x, mask=d < D)


def add_rms_norm(
    x_TD: Tensor,
    update: Tensor | UnscaledProduct | None,
    weight_D: Tensor,
    epsilon: float,
    out: Tensor | QuantizedRows,
    *,
    pdl: bool = False,
) -> None:
    """x += update, in place; out = x / sqrt(mean(x²) + epsilon) * weight, in float32 inside. Contiguous tensors [T, D].

    `QuantizedRows` get x * weight, rounded to x's type first, and the root is in the rows' scales.

    4,096 wide, 1 / 256 / 8,192 rows: 1.2 / 2.2 / 91 µs, the last at 2.97 TB/s (H100, 2026-11-26).
    """
    T, D = x_TD.shape
    update_TD = update.values_MN if isinstance(update, UnscaledProduct) else update
    factors = (update.row_scales_M, update.scales_N) if isinstance(update, UnscaledProduct) else (None, None)
    out_TD = out.values_MK if isinstance(out, QuantizedRows) else out
    assert x_TD.is_contiguous()
    assert out_TD.is_contiguous()
    assert update_TD is None or update_TD.is_contiguous()
    if not T:
        return
    DP = triton.next_power_of_2(D)
    _add_rms_norm[(T,)](
        x_TD, update_TD, *factors, weight_D, out_TD, out.scales_M if isinstance(out, QuantizedRows) else None, epsilon,
        D=D, DP=DP, ADD=update_TD is not None, UNSCALED=isinstance(update, UnscaledProduct),
        QUANTIZED=isinstance(out, QuantizedRows), PDL=pdl, num_warps=min(8, max(1, DP // 512)), launch_pdl=pdl,
    )  # fmt: skip


def embed_share(tokens_T: Tensor, table_VD: Tensor, first: int, out_TD: Tensor, *, pdl: bool = False) -> None:
    """See `DeviceOperations`."""
    T, D = out_TD.shape
    DP = triton.next_power_of_2(D)
    _embed_share[(T,)](
        tokens_T, table_VD, out_TD, len(table_VD), first, D=D, DP=DP, PDL=pdl, num_warps=min(8, max(1, DP // 512)),
        launch_pdl=pdl,
    )  # fmt: skip


def embed(
    tokens_T: Tensor,
    table_VD: Tensor,
    gain_D: Tensor,
    x_TD: Tensor,
    gained_TD: Tensor,
    squares_TQ: Tensor,
    *,
    peaks_TA: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """x = table[tokens]; gained = x * gain; squares[t, q] = the sum of x² over the q-th of Q equal parts of the row.

    The first kernel of a decode step with folded norms: `gain` is the first layer's norm weight. `peaks_TA`, if given,
    are raised to the peaks of gained (`triton_quantize`).
    """
    T, D = x_TD.shape
    Q = squares_TQ.shape[1]
    assert D % Q == 0, "the sums of squares must cover equal parts of a row"
    _embed[(T,)](
        tokens_T, table_VD, gain_D, x_TD, gained_TD, squares_TQ, peaks_TA,
        D=D, Q=Q, QP=triton.next_power_of_2(Q), DQ=triton.next_power_of_2(D // Q), A=PEAKS_PER_ROW,
        PEAKS=peaks_TA is not None, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
