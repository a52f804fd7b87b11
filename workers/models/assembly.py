"""From a `ModelConfig` to a `Transformer`: the layers as their family builds them, the embedding before and the output
head behind them.

What a model asks for while it is built is also what its checkpoint must have (`tensor_shapes`) and what a rank keeps
(`count_weights`): both are found by building it without memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.operations import Operations, reference_operations
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.models.adapter_sites import LinearForms, PlainLinears
from tensorweave.workers.models.checkpoint import Shapes
from tensorweave.workers.models.config import ModelConfig, ModelEnds
from tensorweave.workers.models.ends import Embedding, Head, ScaledEmbedding, ScaledHead
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.layers import OutputHead, RmsNorm, SplitVocabEmbedding, VocabEmbedding
from tensorweave.workers.models.rank_weights import MetaWeights, RankWeights, TensorRows
from tensorweave.workers.models.shards import split_evenly
from tensorweave.workers.models.sizes import ExpertSizes
from tensorweave.workers.models.stack import make_stack
from tensorweave.workers.models.tensor_names import EMBEDDING, FINAL_NORM, HEAD
from tensorweave.workers.models.transformer import Transformer


def build_transformer(
    config: ModelConfig,
    place: MeshRank,
    weights: RankWeights,
    comm: Comm,
    operations: Operations,
    linears: LinearForms | None = None,
) -> Transformer:
    """Read one rank's share of the weights and put the layers around it. `linears` notes what adapters may update;
    None: nothing."""
    sizes, ends = config.sizes, config.ends
    vocab = split_evenly(sizes.vocab_size, place.mesh.tensor)[place.tensor]
    shape = (sizes.vocab_size, sizes.hidden_size)
    embedding_VD = weights.rows([TensorRows(EMBEDDING, shape, vocab)])
    forms = PlainLinears() if linears is None else linears
    layers = [
        layer.build(LayerBuilder(f"model.layers.{i}", sizes, weights, place, comm, operations, forms))
        for i, layer in enumerate(config.layers)
    ]
    is_tied = config.has_tied_embeddings
    head_VD = weights.tied_head(embedding_VD) if is_tied else weights.matrix_rows([TensorRows(HEAD, shape, vocab)])
    final_norm_D = weights.vector(FINAL_NORM, sizes.hidden_size)
    return Transformer(
        embedding=_embedding(embedding_VD, sizes.vocab_size, vocab, ends.embedding_factor, comm),
        stack=make_stack(layers, can_be_native=place.mesh.tensor == 1 and operations.has_native_attention),
        final_norm=RmsNorm(operations.add_rms_norm, final_norm_D, sizes.norm_epsilon, sizes.norm_offset),
        head=_head(operations.make_linear(head_VD, None), sizes.vocab_size, place, ends, comm),
    )


def _embedding(weight_VD: Tensor, vocab_size: int, vocab: range, factor: float, comm: Comm) -> Embedding:
    has_all_words = len(vocab) == vocab_size
    table = VocabEmbedding(weight_VD) if has_all_words else SplitVocabEmbedding(weight_VD, vocab.start, comm)
    return table if factor == 1.0 else ScaledEmbedding(table, factor)


def _head(linear: Linear, vocab_size: int, place: MeshRank, ends: ModelEnds, comm: Comm) -> Head:
    shares = split_evenly(vocab_size, place.mesh.tensor)
    head = OutputHead(linear, tuple(len(share) for share in shares), comm)
    is_plain = ends.logit_factor == 1.0 and ends.logit_cap is None
    return head if is_plain else ScaledHead(head, ends.logit_factor, ends.logit_cap)


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor that a checkpoint of this model must have."""
    return count_weights(config, MeshRank()).shapes


def count_weights(config: ModelConfig, place: MeshRank) -> MetaWeights:
    """What the rank at `place` asks for of a checkpoint."""
    weights = MetaWeights()
    build_without_memory(config, place, weights)
    return weights


def weights_per_layer(config: ModelConfig, mesh: Mesh) -> int:
    """Weights of a layer's products, on average over the layers, on the gang's first rank."""
    weights = count_weights(config, MeshRank(0, mesh))
    return (weights.num_multiplied - weights.num_in_head) // len(config.layers)


def build_without_memory(config: ModelConfig, place: MeshRank, weights: MetaWeights | None = None) -> Transformer:
    """The model as the rank at `place` builds it, on torch's meta device."""
    operations = reference_operations(torch.device("meta"), torch.float32)
    return build_transformer(config, place, weights or MetaWeights(), SoloComm(), operations)


def check_mesh(config: ModelConfig, place: MeshRank) -> None:
    """Raises ValueError where a rank would be left without a head, a column or a word."""
    mesh, sizes = place.mesh, config.sizes
    if not mesh.is_tensor_only:
        raise ValueError(f"{mesh}: ranks share a model along the tensor axis only")
    if mesh.tensor > sizes.num_heads:
        raise ValueError(
            f"tensor_parallel_size is {mesh.tensor}; this model has {sizes.num_heads} attention heads to share"
        )
    if mesh.tensor > min(sizes.intermediate_size, sizes.vocab_size):
        raise ValueError(
            f"tensor_parallel_size is {mesh.tensor}; larger than the model's intermediate or vocabulary size"
        )
    _check_expert_mesh(sizes.experts, mesh)


def _check_expert_mesh(experts: ExpertSizes | None, mesh: Mesh) -> None:
    if experts is None:
        if mesh.expert > 1:
            raise ValueError(f"moe_expert_parallel_size is {mesh.expert}; this model has no experts to share")
        return
    if mesh.expert > experts.num_experts:
        raise ValueError(f"moe_expert_parallel_size is {mesh.expert}; this model has {experts.num_experts} experts")
    if mesh.moe_tensor > experts.width:
        raise ValueError(
            f"moe_tensor_parallel_size is {mesh.moe_tensor}; an expert of this model is {experts.width} wide"
        )
    if experts.shared_width and mesh.tensor > experts.shared_width:
        raise ValueError(
            f"tensor_parallel_size is {mesh.tensor}; this model's shared expert is {experts.shared_width} wide"
        )
