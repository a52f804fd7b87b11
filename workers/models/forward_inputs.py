"""`ForwardInputs`: a step's batch as the layers of a model see it. Made by the engine once per step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionPlan

# T tokens


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """A packed batch on the device. Every layer gets all of it: an adapter, for one, multiplies each row by the
    matrices of the row's own request, and the mapping from rows to adapters is a further field here.

    `rope_tables`, one for each of the model's rotations, have a row of cosines and sines for each token."""

    token_ids_T: Tensor
    rope_tables: tuple[Tensor, ...]
    attention: AttentionPlan
