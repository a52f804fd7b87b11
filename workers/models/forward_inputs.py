"""`ForwardInputs`: a step's batch as the layers of a model see it. Made by the engine once per step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionPlan
from tensorweave.kernels.lora.reference import NO_UPDATES, Updates

# T tokens


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """A packed batch on the device. Every layer gets all of it. `updates` is what adapters add to the products of their
    own requests' rows.

    `rope_tables`, one for each of the model's rotations, have a row of cosines and sines for each token."""

    token_ids_T: Tensor
    rope_tables: tuple[Tensor, ...]
    attention: AttentionPlan
    updates: Updates = NO_UPDATES
