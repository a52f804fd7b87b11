"""`PenaltyOperations`: penalties by counts on the device, in the form that is chosen for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.penalties import reference
from tensorweave.kernels.penalties.reference import PenalisedRows


@dataclass(frozen=True, slots=True)
class PenaltyOperations:
    """See `kernels.penalties.reference`."""

    penalise: Callable[[Tensor, Tensor, PenalisedRows], None]
    count: Callable[[Tensor, Tensor, PenalisedRows], None]


def choose_penalties(device: torch.device) -> PenaltyOperations:
    if device.type == "cuda":
        from tensorweave.kernels.penalties import triton  # only where there is a GPU

        return PenaltyOperations(triton.penalise, triton.count)
    return PenaltyOperations(reference.penalise, reference.count)
