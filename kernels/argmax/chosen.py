"""`argmax` in the form that is chosen for the logits' device."""

from __future__ import annotations

from torch import Tensor

from tensorweave.kernels.argmax.reference import NO_PLACE as NO_PLACE
from tensorweave.kernels.operations import choose_argmax


def argmax(x_RV: Tensor) -> Tensor:
    return choose_argmax(x_RV.device)(x_RV)
