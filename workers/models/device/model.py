"""`DeviceModel`: the weights of one rank as the steps of a `DeviceEngine` read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.weights import Matrix, num_inputs, num_outputs
from tensorweave.workers.models.decoder_layer import Attention, DecoderLayer, GatedMlp
from tensorweave.workers.models.device.folding import head_order, scaled, whole_table, with_heads_in_order
from tensorweave.workers.models.device.mlp import (
    UNKNOWN_FORM,
    DeviceMixture,
    DeviceMlp,
    can_take_matrix,
    missing_of_mlp,
    take_matrix,
    take_mlp,
    weight_of,
)
from tensorweave.workers.models.device.over_ranks import GROUPS_OVER_RANKS, is_grouped, missing_over_ranks
from tensorweave.workers.models.ends import Embedding, ScaledEmbedding, ScaledHead
from tensorweave.workers.models.layers import (
    AdaptedColumnLinear,
    AdaptedRowLinear,
    ColumnLinear,
    OutputHead,
    RmsNorm,
    SplitVocabEmbedding,
    VocabEmbedding,
)
from tensorweave.workers.models.residual import OutputChange, Scaled, Unchanged
from tensorweave.workers.models.shards import shard_heads
from tensorweave.workers.models.stack import TorchStack
from tensorweave.workers.models.transformer import Transformer

# D hidden size, L positions, H head dim, V vocabulary

_HEAD_DIMS: Final = (16, 32, 64, 128, 256)
"""Elements of a head that the kernels on a GPU compute."""


@dataclass(frozen=True, slots=True)
class LayerSites:
    """Numbers of the products that adapters may update."""

    qkv: int
    output: int
    gate_up: int
    down: int


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """`after_attention_norm_D` and `after_mlp_norm_D` are of what is added to the residual: both or none."""

    norm_D: Tensor
    qkv: Matrix
    rotation: HeadRotation
    output: Matrix
    mlp_norm_D: Tensor
    mlp: DeviceMlp | DeviceMixture
    window: int | None
    scale: float
    sites: LayerSites | None = None
    after_attention_norm_D: Tensor | None = None
    after_mlp_norm_D: Tensor | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Without those of experts that are routed."""
        return self.qkv, self.output, *self.mlp.matrices


@dataclass(frozen=True, slots=True)
class VocabularyShare:
    """The tokens of a rank, from `first` on; `sizes` are those of all ranks' shares."""

    first: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """One rank's share of a model, or all of it. The numbers of heads, columns and tokens are the rank's own.

    `has_reordered_heads`: elements of queries and keys, also in the cache, are in an order of their own, see `folding`.
    """

    layers: tuple[DeviceLayer, ...]
    embedding_VD: Tensor
    norm_D: Tensor
    head: Matrix
    head_dim: int
    epsilon: float
    vocabulary: VocabularyShare
    has_reordered_heads: bool = False

    @property
    def is_whole(self) -> bool:
        return len(self.vocabulary.sizes) == 1

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
    def has_norms_behind(self) -> bool:
        """Whether what attention and MLP return is normed."""
        return any(layer.after_attention_norm_D is not None for layer in self.layers)

    @property
    def intermediate_size(self) -> int:
        """The width of plain MLPs; 0 if there are none."""
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
    """Take over a rank's transformer. Its gate and up rows are interleaved in place: it is of no use afterwards.

    Args:
        rope_tables: one for each of the model's rotations, [L, W].

    Raises:
        ValueError: names what the kernels do not compute.
    """
    stack = transformer.stack
    if (missing := what_is_missing(transformer, [table_LH.shape[1] for table_LH in rope_tables])) is not None:
        raise ValueError(f"a device engine has no kernels for {missing}")
    assert isinstance(stack, TorchStack)
    head, factor, norm_D = transformer.head, 1.0, transformer.final_norm.weight_D
    if isinstance(head, ScaledHead):
        factor = head.factor
        head = head.head
    assert isinstance(head, OutputHead)
    layers = tuple(_take_layer(layer, rope_tables[layer.attention.rope]) for layer in stack.layers)
    attentions = [layer.attention for layer in stack.layers]
    return DeviceModel(
        layers=layers,
        embedding_VD=_embedding(transformer.embedding),
        norm_D=norm_D if factor == 1.0 else norm_D * factor,
        head=take_matrix(head.linear),
        head_dim=attentions[0].head_dim,
        epsilon=transformer.final_norm.epsilon,
        vocabulary=_vocabulary(transformer.embedding, head),
        has_reordered_heads=any(_order(each, rope_tables[each.rope].shape[1]) is not None for each in attentions),
    )


def _embedding(embedding: Embedding) -> Tensor:
    """A new table where there is a factor: the output head may be the same."""
    if isinstance(embedding, ScaledEmbedding):
        table_VD = _embedding(embedding.embedding)
        return table_VD * table_VD.new_tensor(embedding.factor)
    assert isinstance(embedding, VocabEmbedding | SplitVocabEmbedding)
    return embedding.weight_VD


def _vocabulary(embedding: Embedding, head: OutputHead) -> VocabularyShare:
    if isinstance(embedding, ScaledEmbedding):
        embedding = embedding.embedding
    return VocabularyShare(embedding.first if isinstance(embedding, SplitVocabEmbedding) else 0, head.sizes)


def what_is_missing(transformer: Transformer, rope_widths: Sequence[int]) -> str | None:
    """What the kernels do not compute of a model, which may be without memory, or None. `rope_widths` are the elements
    of a head that each of its rotations turns."""
    head, embedding = transformer.head, transformer.embedding
    if isinstance(head, ScaledHead):
        if head.cap is not None:
            return "soft caps of logits"
        head = head.head
    if isinstance(embedding, ScaledEmbedding):
        embedding = embedding.embedding
    if not isinstance(embedding, VocabEmbedding | SplitVocabEmbedding) or not isinstance(head, OutputHead):
        return "such embeddings or output heads"
    if not can_take_matrix(head.linear):
        return UNKNOWN_FORM
    is_split = len(head.sizes) > 1
    if is_split and is_grouped(head.linear):
        return GROUPS_OVER_RANKS
    assert isinstance(transformer.stack, TorchStack)
    layers = transformer.stack.layers
    found = [_missing_of_layer(layer, rope_widths) for layer in layers]
    if is_split and not any(found):
        found = [missing_over_ranks(layer) for layer in layers]
    return next((missing for missing in found if missing is not None), None)


def _missing_of_layer(layer: DecoderLayer, rope_widths: Sequence[int]) -> str | None:
    attention, norm, mlp_norm, mlp = layer.attention, layer.attention_norm, layer.mlp_norm, layer.mlp
    has_norms = isinstance(norm, RmsNorm) and isinstance(mlp_norm, RmsNorm)
    after = (layer.after_attention, layer.after_mlp)
    if not has_norms or len({isinstance(each, RmsNorm) for each in after}) > 1:
        return "norms behind attention and MLP alone"
    has_offset = any(isinstance(each, RmsNorm) and each.offset for each in (norm, mlp_norm, *after))
    if has_offset or (attention.norms is not None and attention.norms.offset):
        return "norms whose weights have an offset"
    if isinstance(layer.after_mlp, RmsNorm) and not isinstance(mlp, GatedMlp):
        return "norms behind experts"
    if (missing := missing_of_mlp(mlp)) is not None:
        return missing
    if not isinstance(attention.qkv, ColumnLinear | AdaptedColumnLinear):
        return "norms over all heads together"
    if not can_take_matrix(attention.qkv.linear) or not can_take_matrix(attention.output.linear):
        return UNKNOWN_FORM
    if attention.soft_cap is not None or attention.sinks_N is not None:
        return "soft caps and sinks in attention"
    if isinstance(attention.qkv, AdaptedColumnLinear):
        return _missing_with_adapters(layer, rope_widths[attention.rope])
    return None


def _missing_with_adapters(layer: DecoderLayer, rope_width: int) -> str | None:
    if not isinstance(layer.mlp, GatedMlp):
        return "adapters of models with experts"
    if not isinstance(layer.after_attention, Unchanged) or not isinstance(layer.after_mlp, Unchanged):
        return "adapters of models with factors or norms behind attention and MLP"
    if _order(layer.attention, rope_width) is not None:
        return "adapters of models that rotate neighbouring elements or part of a head"
    return None


def _order(attention: Attention, rope_width: int) -> Tensor | None:
    return head_order(attention.head_dim, rope_width, has_neighbours=attention.has_neighbours)


def missing_of_sizes(
    num_heads: int, num_kv_heads: int, head_dim: int, tokens_per_block: int, num_ranks: int
) -> str | None:
    """Which sizes of a model the kernels on a GPU do not compute, or None: as many query heads for each KV head of a
    rank, and powers of two. The references compute heads of any size."""
    is_even = num_heads % num_kv_heads == 0 and all(
        len(heads.query) == heads.group_size * len(heads.kv) and heads.read_heads == tuple(range(len(heads.kv)))
        for heads in shard_heads(num_heads, num_kv_heads, num_ranks)
    )
    if not is_even:
        return f"{num_heads} query heads on {num_kv_heads} KV heads over {num_ranks} ranks"
    if head_dim not in _HEAD_DIMS:
        return f"heads of {head_dim} elements"
    return None if _is_power_of_two(tokens_per_block) else f"KV blocks of {tokens_per_block} tokens"


def _take_layer(layer: DecoderLayer, rope_table_LW: Tensor) -> DeviceLayer:
    attention = layer.attention
    assert isinstance(layer.attention_norm, RmsNorm)
    assert isinstance(layer.mlp_norm, RmsNorm)
    assert isinstance(attention.qkv, ColumnLinear | AdaptedColumnLinear)
    qkv, norms = attention.qkv.linear, attention.norms
    if (order_H := _order(attention, rope_table_LW.shape[1])) is not None:
        order_H = order_H.to(rope_table_LW.device)
        qkv = with_heads_in_order(qkv, order_H, _num_turned(attention, qkv))
        rope_table_LW = whole_table(rope_table_LW, attention.head_dim)
        norms = None if norms is None else replace(norms, query_H=norms.query_H[order_H], key_H=norms.key_H[order_H])
    rotation = (
        HeadRotation(rope_table_LW)
        if norms is None
        else HeadRotation(rope_table_LW, norms.query_H, norms.key_H, norms.epsilon)
    )
    return DeviceLayer(
        norm_D=layer.attention_norm.weight_D,
        qkv=take_matrix(qkv),
        rotation=rotation,
        output=take_matrix(scaled(attention.output.linear, _factor(layer.after_attention))),
        mlp_norm_D=layer.mlp_norm.weight_D,
        mlp=take_mlp(layer.mlp, _factor(layer.after_mlp)),
        window=attention.window,
        scale=attention.scale,
        sites=_sites(layer),
        after_attention_norm_D=_norm(layer.after_attention),
        after_mlp_norm_D=_norm(layer.after_mlp),
    )


def _norm(change: OutputChange) -> Tensor | None:
    return change.weight_D if isinstance(change, RmsNorm) else None


def _factor(change: OutputChange) -> float:
    return change.factor if isinstance(change, Scaled) else 1.0


def _num_turned(attention: Attention, qkv: Linear) -> int:
    """Outputs that are queries and keys: all but the values, of which there are as many as keys."""
    num_queries = num_inputs(weight_of(attention.output.linear))
    return num_queries + (num_outputs(weight_of(qkv)) - num_queries) // 2


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
