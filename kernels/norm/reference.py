"""Root-mean-square normalisation of the last dimension. Called by every layer, twice, and on the heads of Qwen3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.native.library import native_for

# T tokens, D width


def add_rms_norm(x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, epsilon: float) -> Tensor:
    """x += update, in place; then `rms_norm` of x. The update may be None for nothing."""
    native = native_for(x_TD)
    if native is None:
        if update_TD is not None:
            x_TD += update_TD
        return rms_norm(x_TD, weight_D, epsilon)
    assert x_TD.is_contiguous()
    assert update_TD is None or update_TD.is_contiguous()
    out_TD = torch.empty_like(x_TD)
    update = None if update_TD is None else update_TD.data_ptr()
    native.add_rms_norm(
        x_TD.data_ptr(),
        update,
        weight_D.data_ptr(),
        out_TD.data_ptr(),
        *x_TD.shape,
        epsilon,
    )
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight over the last dimension; any leading dimensions.

    Zhang and Sennrich, 2019 (arXiv 1910.07467). Half precision is normalised in float32, then rounded.
    """
    if x_TD.dtype == torch.float32:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, epsilon)
    return rms_norm_reference(x_TD, weight_D, epsilon)


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    wide = x_TD.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return wide.to(x_TD.dtype) * weight_D
