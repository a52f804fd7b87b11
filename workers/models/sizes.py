"""The numbers that describe a transformer's shape, and the shape of the KV that one of its layers keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerKv:
    """What one layer keeps of each token: a key and a value per KV head.

    `window` is the number of positions that a token attends to, its own included; None: all before it. Keys are
    rotated by the model's `ropes[rope]`.
    """

    num_heads: int
    head_dim: int
    window: int | None = None
    rope: int = 0


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Of the layers that have experts. `width` is the intermediate size of one, `shared_width` that of the expert for
    all tokens; 0: there is none."""

    num_experts: int
    width: int
    shared_width: int = 0


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes over all ranks. In every RMSNorm, `norm_epsilon` is added to the mean square and `norm_offset` to the
    weights. `experts` is None where no layer has any."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    norm_offset: float = 0.0
    experts: ExpertSizes | None = None

    def kv(self, window: int | None = None, rope: int = 0) -> LayerKv:
        return LayerKv(self.num_kv_heads, self.head_dim, window, rope)
