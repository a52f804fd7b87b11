"""Root-mean-square normalisation of the last dimension, in torch. Every layer calls it twice, Qwen3's also per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# T tokens, D width


def add_rms_norm(x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, epsilon: float) -> Tensor:
    """x += update, in place, where there is an update; return `rms_norm` of x."""
    if update_TD is not None:
        x_TD += update_TD
    return rms_norm(x_TD, weight_D, epsilon)


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight over the last dimension; any leading dimensions.

    Zhang and Sennrich, 2019 (arXiv 1910.07467). Half precision is normalised in float32, then rounded.
    """
    if x_TD.dtype == torch.float32:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, epsilon)
    wide = x_TD.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return wide.to(x_TD.dtype) * weight_D
