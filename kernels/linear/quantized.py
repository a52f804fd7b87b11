"""Products of 8-bit rows with a `QuantizedWeight`, by torch's scaled product where the device has it: many rows.

Of few rows, `thin_linear` quantizes what it reads. The arithmetic is that of `linear.reference.QuantizedLinear` in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.weights import FP8, QuantizedWeight

# M rows, N outputs, K inputs


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations in 8-bit floats (e4m3) with a float32 scale for each row: x = values * scales."""

    values_MK: Tensor
    scales_M: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_inputs: int, device: torch.device) -> QuantizedRows:
        return cls(
            torch.empty(num_rows, num_inputs, dtype=FP8, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True, slots=True)
class UnscaledProduct:
    """A product before its scales are applied: y = values * row_scales * scales. The kernel that reads it does so."""

    values_MN: Tensor
    row_scales_M: Tensor
    scales_N: Tensor


def can_scale(weight: QuantizedWeight) -> bool:
    """Whether torch's scaled product is for this weight: of bfloat16 rows, with sizes that are multiples of 16."""
    return weight.dtype == torch.bfloat16 and all(size % 16 == 0 for size in weight.values_NK.shape)


def scaled_linear(
    x: QuantizedRows, weight: QuantizedWeight, out_MN: Tensor | None = None, bias_N: Tensor | None = None
) -> Tensor:
    """x weightᵀ + bias: [M, N] in the weight's `dtype`, contiguous."""
    row_scales_M1, scales_1N = x.scales_M.unsqueeze(1), weight.scales_N.unsqueeze(0)
    if x.values_MK.device.type == "cpu":
        product_MN = _wide_product(x, weight).mul_(row_scales_M1 * scales_1N)
        product_MN = (product_MN if bias_N is None else product_MN + bias_N).to(weight.dtype)
        return product_MN if out_MN is None else out_MN.copy_(product_MN)
    if out_MN is None:
        out_MN = torch.empty(len(x.scales_M), len(weight.scales_N), dtype=weight.dtype, device=x.scales_M.device)
    _scaled_mm(x, weight, row_scales_M1, scales_1N, out_MN, bias_N)
    return out_MN


def unscaled_linear(x: QuantizedRows, weight: QuantizedWeight, ones: Tensor, out_MN: Tensor) -> UnscaledProduct:
    """The same into `out_MN` without scales, which the next kernel applies. `ones`: a float32 1 on the device.

    28,672 x 4,096 at 16 / 256 rows: 43 / 57 µs, with scales 50 / 64 (H100, 2026-11-26).
    """
    if x.values_MK.device.type == "cpu":
        out_MN.copy_(_wide_product(x, weight))
    else:
        _scaled_mm(x, weight, ones, ones, out_MN, None)
    return UnscaledProduct(out_MN, x.scales_M, weight.scales_N)


def _wide_product(x: QuantizedRows, weight: QuantizedWeight) -> Tensor:
    return x.values_MK.float() @ weight.values_NK.float().T


def _scaled_mm(
    x: QuantizedRows,
    weight: QuantizedWeight,
    row_scales: Tensor,
    scales: Tensor,
    out_MN: Tensor,
    bias_N: Tensor | None,
) -> None:
    torch._scaled_mm(
        x.values_MK,
        weight.values_NK.T,
        row_scales,
        scales,
        bias=bias_N,
        out_dtype=weight.dtype,
        use_fast_accum=True,
        out=out_MN,
    )
