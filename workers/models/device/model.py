"""`DeviceModel`: the weights of one rank as the steps of a `DeviceEngine` read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.weights import Matrix
from tensorweave.workers.models.decoder_layer import DecoderLayer, GatedMlp
from tensorweave.workers.models.device.mlp import (
    UNKNOWN_FORM,
    DeviceMixture,
    DeviceMlp,
    can_take_matrix,
    missing_of_mlp,
    take_matrix,
    take_mlp,
)
from tensorweave.workers.models.layers import (
    AdaptedColumnLinear,
    AdaptedRowLinear,
    ColumnLinear,
    OutputHead,
    RmsNorm,
    VocabEmbedding,
)
from tensorweave.workers.models.residual import Unchanged
from tensorweave.workers.models.stack import TorchStack
from tensorweave.workers.models.transformer import Transformer

# D hidden size, L positions, H head dim, V vocabulary


@dataclass(frozen=True, slots=True)
class LayerSites:
    """Numbers of the products that adapters may update."""

    qkv: int
    output: int
    gate_up: int
    down: int


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    norm_D: Tensor
    qkv: Matrix
    rotation: HeadRotation
    output: Matrix
    mlp_norm_D: Tensor
    mlp: DeviceMlp | DeviceMixture
    window: int | None
    sites: LayerSites | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Without those of experts that are routed."""
        return self.qkv, self.output, *self.mlp.matrices


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """All of a model on one device."""

    layers: tuple[DeviceLayer, ...]
    embedding_VD: Tensor
    norm_D: Tensor
    head: Matrix
    head_dim: int
    epsilon: float

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def hidden_size(self) -> int:
        return self.embedding_VD.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.head.num_outputs

    @property
    def has_adapters(self) -> bool:
        """Whether adapters may update its products."""
        return self.layers[0].sites is not None

    @property
    def intermediate_size(self) -> int:
        """Of plain MLPs; 0 if there are none."""
        return max((mlp.gated_width for mlp in self.plain_mlps), default=0)

    @property
    def plain_mlps(self) -> tuple[DeviceMlp, ...]:
        """Not those of experts."""
        return tuple(layer.mlp for layer in self.layers if isinstance(layer.mlp, DeviceMlp))

    @property
    def num_placed_heads(self) -> int:
        """Query, key and value heads together."""
        return self.layers[0].qkv.num_outputs // self.head_dim

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.layers[0].output.num_inputs // self.head_dim


def take_model(transformer: Transformer, rope_tables: Sequence[Tensor]) -> DeviceModel:
    """Take over a transformer that one rank holds whole. Its gate and up rows are interleaved in place, so that it is
    of no use afterwards.

    Args:
        rope_tables: one for each of the model's rotations, [L, H].

    Raises:
        ValueError: names what the kernels do not compute.
    """
    stack, embedding, head = transformer.stack, transformer.embedding, transformer.head
    head_dim = rope_tables[0].shape[1]
    if (missing := what_is_missing(transformer, [table_LH.shape[1] for table_LH in rope_tables])) is not None:
        raise ValueError(f"a device engine has no kernels for {missing}")
    assert isinstance(stack, TorchStack)
    assert isinstance(embedding, VocabEmbedding)
    assert isinstance(head, OutputHead)
    layers = tuple(_take_layer(layer, rope_tables[layer.attention.rope]) for layer in stack.layers)
    return DeviceModel(
        layers=layers,
        embedding_VD=embedding.weight_VD,
        norm_D=transformer.final_norm.weight_D,
        head=take_matrix(head.linear),
        head_dim=head_dim,
        epsilon=transformer.final_norm.epsilon,
    )


def what_is_missing(transformer: Transformer, rope_widths: Sequence[int]) -> str | None:
    """What the kernels do not compute of a model, which may be without memory, or None. `rope_widths` are the elements
    of a head that each of its rotations turns."""
    head = transformer.head
    if not isinstance(transformer.embedding, VocabEmbedding) or not isinstance(head, OutputHead):
        return "factors of embeddings or logits, soft caps, or vocabularies split over ranks"
    if not can_take_matrix(head.linear):
        return UNKNOWN_FORM
    assert isinstance(transformer.stack, TorchStack)
    found = (_missing_of_layer(layer, rope_widths) for layer in transformer.stack.layers)
    return next((missing for missing in found if missing is not None), None)


def _missing_of_layer(layer: DecoderLayer, rope_widths: Sequence[int]) -> str | None:
    attention, norm, mlp_norm, mlp = layer.attention, layer.attention_norm, layer.mlp_norm, layer.mlp
    has_norms = isinstance(norm, RmsNorm) and isinstance(mlp_norm, RmsNorm)
    if not has_norms or not isinstance(layer.after_attention, Unchanged) or not isinstance(layer.after_mlp, Unchanged):
        return "norms or factors behind attention and MLP"
    if any(isinstance(each, RmsNorm) and each.offset for each in (norm, mlp_norm)):
        return "norms whose weights have an offset"
    if (missing := missing_of_mlp(mlp)) is not None:
        return missing
    if isinstance(attention.qkv, AdaptedColumnLinear) and not isinstance(mlp, GatedMlp):
        return "adapters of models with experts"
    if not isinstance(attention.qkv, ColumnLinear | AdaptedColumnLinear):
        return "norms over all heads together"
    if not can_take_matrix(attention.qkv.linear) or not can_take_matrix(attention.output.linear):
        return UNKNOWN_FORM
    if attention.soft_cap is not None or attention.sinks_N is not None:
        return "soft caps and sinks in attention"
    if attention.has_neighbours or rope_widths[attention.rope] != attention.head_dim:
        return "rotations of neighbouring elements or of part of a head"
    if attention.scale != attention.head_dim**-0.5:
        return "scores with a scale of their own"
    return None


def can_take(num_heads: int, num_kv_heads: int, head_dim: int, tokens_per_block: int, num_ranks: int) -> bool:
    """Whether the kernels of a device engine are for such a model: whole heads on one rank, and sizes that are powers
    of two."""
    is_even = num_heads % num_kv_heads == 0
    has_kernels = _is_power_of_two(head_dim) and 16 <= head_dim <= 256 and _is_power_of_two(tokens_per_block)
    return num_ranks == 1 and is_even and has_kernels


def _take_layer(layer: DecoderLayer, rope_table_LH: Tensor) -> DeviceLayer:
    attention, norms = layer.attention, layer.attention.norms
    assert isinstance(layer.attention_norm, RmsNorm)
    assert isinstance(layer.mlp_norm, RmsNorm)
    assert isinstance(attention.qkv, ColumnLinear | AdaptedColumnLinear)
    rotation = (
        HeadRotation(rope_table_LH)
        if norms is None
        else HeadRotation(rope_table_LH, norms.query_H, norms.key_H, norms.epsilon)
    )
    return DeviceLayer(
        norm_D=layer.attention_norm.weight_D,
        qkv=take_matrix(attention.qkv.linear),
        rotation=rotation,
        output=take_matrix(attention.output.linear),
        mlp_norm_D=layer.mlp_norm.weight_D,
        mlp=take_mlp(layer.mlp),
        window=attention.window,
        sites=_sites(layer),
    )


def _sites(layer: DecoderLayer) -> LayerSites | None:
    attention, mlp = layer.attention, layer.mlp
    qkv, output = attention.qkv, attention.output
    if not isinstance(qkv, AdaptedColumnLinear) or not isinstance(output, AdaptedRowLinear):
        return None
    assert isinstance(mlp, GatedMlp)
    assert isinstance(mlp.gate_up, AdaptedColumnLinear)
    assert isinstance(mlp.down, AdaptedRowLinear)
    return LayerSites(qkv.site, output.site, mlp.gate_up.site, mlp.down.site)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
