"""`ModelConfig`: everything that loading and running a decoder-only transformer needs to know of it.

`workers.models.families` makes one from a Hugging Face config.json. What is particular to a family is in its layers:
each is a `LayerDesign`, which says what KV the layer keeps and builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tensorweave.workers.models.decoder_layer import DecoderLayer
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization
from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.sizes import LayerKv, ModelSizes


class LayerDesign(Protocol):
    """One layer as its family describes it."""

    @property
    def kv(self) -> LayerKv: ...

    def build(self, layer: LayerBuilder) -> DecoderLayer:
        """Read this rank's share of the layer's weights and put the layer around them.

        The tensors that are asked for here, and their shapes, are those that a checkpoint must have.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelEnds:
    """What is done to embedded tokens and to logits: both multiplied by a factor; then, with a cap, logits become
    cap * tanh(logits / cap)."""

    embedding_factor: float = 1.0
    logit_factor: float = 1.0
    logit_cap: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`max_seq_len` counts the positions that the model may use, `end_ids` are the tokens that end a sequence.

    `ropes` are the rotations of its layers, each of which names one (`LayerKv.rope`). For `nested_names` and
    `has_stacked_experts` see `Family`. `quantization` is how the checkpoint's matrices are quantized; None: they are
    not.
    """

    architecture: str
    sizes: ModelSizes
    layers: tuple[LayerDesign, ...]
    ropes: tuple[RopeConfig, ...]
    max_seq_len: int
    ends: ModelEnds = field(default_factory=ModelEnds)
    nested_names: Mapping[str, str] = field(default_factory=dict)
    has_stacked_experts: bool = False
    has_tied_embeddings: bool = False
    checkpoint_dtype: str = "float32"
    quantization: CheckpointQuantization | None = None
    end_ids: tuple[int, ...] = ()

    @property
    def default_seq_len(self) -> int:
        """The longest sequence where nobody says: not beyond the length at which longrope changes its factors for all
        positions, since shorter sequences are meant to have the others."""
        lengths = [rope.original_max_len for rope in self.ropes if rope.kind == "longrope"]
        return min([self.max_seq_len, *lengths])

    @property
    def kv(self) -> LayerKv:
        """What every layer keeps, windows aside: the KV pool has one shape for all layers."""
        shapes = {(layer.kv.num_heads, layer.kv.head_dim) for layer in self.layers}
        assert len(shapes) == 1, f"layers with KV of several shapes: {shapes}"
        return LayerKv(*shapes.pop())

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(layer.kv.window for layer in self.layers)
