"""Root-mean-square normalisation of the last dimension, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# T tokens, D width


def add_rms_norm(
    x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, epsilon: float, offset: float = 0.0
) -> Tensor:
    """x += update, in place, where there is an update; return `rms_norm` of x."""
    if update_TD is not None:
        x_TD += update_TD
    return rms_norm(x_TD, weight_D, epsilon, offset)


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * (weight + offset) over the last dimension; any leading dimensions.

    Zhang and Sennrich, 2019 (arXiv 1910.07467). Half precision is normalised in float32, then rounded. With an offset
    (Gemma's weights are away from 1), the weight is applied before that.
    """
    if offset:
        wide = F.rms_norm(x_TD.float(), weight_D.shape, weight_D.float() + offset, epsilon)
        return wide.to(x_TD.dtype)
    if x_TD.dtype == torch.float32:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, epsilon)
    wide = x_TD.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return wide.to(x_TD.dtype) * weight_D


class SplitNorm:
    """`rms_norm` of rows whose parts lie on several ranks, which sum `squares` between the two calls."""

    def squares(self, x_TD: Tensor) -> Tensor:
        """[T] float32: the sum of squares of each part."""
        return x_TD.float().square().sum(dim=-1)

    def scale(self, x_TD: Tensor, squares_T: Tensor, weight_D: Tensor, width: int, epsilon: float) -> None:
        """Normalise the parts in place. `squares_T` are those of whole rows, which have `width` elements."""
        inverse_T1 = torch.rsqrt(squares_T / width + epsilon).unsqueeze(1)
        x_TD.copy_((x_TD.float() * inverse_T1).to(x_TD.dtype) * weight_D)
