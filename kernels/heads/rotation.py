"""`HeadRotation`: what is done to a projection's new query and key heads before attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# L positions, H head dim


@dataclass(frozen=True, slots=True)
class HeadRotation:
    """Norms, where the model has them (Qwen3), then rotation.

    Args:
        table_LH: float32, a row per position: cosines of the H/2 angles, then their sines.
        query_norm_H: weights of the norm of each query head, or None.
        key_norm_H: the same of each key head; both or none.
        epsilon: of these norms.
    """

    table_LH: Tensor
    query_norm_H: Tensor | None = None
    key_norm_H: Tensor | None = None
    epsilon: float = 0.0
