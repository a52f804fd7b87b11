"""From a `ModelConfig` to a `Transformer`: the layers as their family builds them, the embedding before and the output
head behind them.

What a model asks for while it is built is also what its checkpoint must have (`tensor_shapes`) and what a rank keeps
(`count_weights`): both are found by building it without memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.operations import Operations, reference_operations
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.models.adapter_sites import AdaptedLinears, LinearForms, PlainLinears, Site
from tensorweave.workers.models.checkpoint import Shapes
from tensorweave.workers.models.config import ModelConfig, ModelEnds
from tensorweave.workers.models.ends import Embedding, Head, ScaledEmbedding, ScaledHead, StatesFromStage
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.layers import OutputHead, RmsNorm, SplitVocabEmbedding, VocabEmbedding
from tensorweave.workers.models.rank_weights import MetaWeights, RankWeights, TensorRows
from tensorweave.workers.models.shards import split_evenly
from tensorweave.workers.models.sizes import ExpertSizes, ModelSizes
from tensorweave.workers.models.stack import make_stack
from tensorweave.workers.models.tensor_names import EMBEDDING, FINAL_NORM, HEAD
from tensorweave.workers.models.transformer import Stage, Transformer


def build_transformer(
    config: ModelConfig,
    place: MeshRank,
    weights: RankWeights,
    comm: Comm,
    operations: Operations,
) -> Transformer:
    """Read one rank's share of a model without pipeline stages; see `build_stage`."""
    assert place.mesh.pipeline == 1, place
    built = build_stage(config, place, weights, comm, operations, torch.float32)
    assert isinstance(built, Transformer)
    return built


def build_stage(
    config: ModelConfig,
    place: MeshRank,
    weights: RankWeights,
    comm: Comm,
    operations: Operations,
    dtype: torch.dtype,
    linears: LinearForms | None = None,
) -> Stage:
    """Read one rank's share of the weights and put the layers of its pipeline stage around it.

    Args:
        dtype: of the hidden states that a stage receives.
        linears: notes what adapters may update; None: nothing.
    """
    sizes, forms = config.sizes, PlainLinears() if linears is None else linears
    words = split_evenly(sizes.vocab_size, place.mesh.tensor)[place.tensor]
    has_table = place.is_first_stage or (place.is_last_stage and config.has_tied_embeddings)
    table_VD = weights.rows([_word_rows(EMBEDDING, sizes, words)]) if has_table else None
    layers = [
        config.layers[i].build(LayerBuilder(f"model.layers.{i}", sizes, weights, place, comm, operations, forms))
        for i in stage_layers(config, place)
    ]
    stack = make_stack(layers, can_be_native=place.mesh.tensor == 1 and operations.has_native_attention)
    embedding: Embedding = StatesFromStage(comm.stages, sizes.hidden_size, dtype)
    if place.is_first_stage and table_VD is not None:
        embedding = _embedding(table_VD, sizes.vocab_size, words, config.ends.embedding_factor, comm)
    if not place.is_last_stage:
        return Stage(embedding, stack)
    if table_VD is not None and config.has_tied_embeddings:
        head_VD = weights.tied_head(table_VD)
    else:
        head_VD = weights.matrix_rows([_word_rows(HEAD, sizes, words)])
    final_norm_D = weights.vector(FINAL_NORM, sizes.hidden_size)
    return Transformer(
        embedding=embedding,
        stack=stack,
        final_norm=RmsNorm(operations.add_rms_norm, final_norm_D, sizes.norm_epsilon, sizes.norm_offset),
        head=_head(operations.make_linear(head_VD, None), sizes.vocab_size, place, config.ends, comm),
    )


def _word_rows(name: str, sizes: ModelSizes, words: range) -> TensorRows:
    """This rank's rows of the table of embeddings, or of the output head."""
    return TensorRows(name, (sizes.vocab_size, sizes.hidden_size), words)


def stage_layers(config: ModelConfig, place: MeshRank) -> range:
    """The layers of this rank's pipeline stage. Where they do not divide, the first stages have one more: the last one
    has the output head."""
    return split_evenly(len(config.layers), place.mesh.pipeline)[place.pipeline]


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
    _build_on_meta(config, place, weights)
    return weights


def weights_per_layer(config: ModelConfig, mesh: Mesh) -> int:
    """Weights of a layer's products, on average over the layers, on the gang's first rank."""
    place = MeshRank(0, mesh)
    weights = count_weights(config, place)
    return (weights.num_multiplied - weights.num_in_head) // len(stage_layers(config, place))


def build_without_memory(config: ModelConfig, place: MeshRank) -> Transformer:
    """The model as the rank at `place`, which has the output head, builds it on torch's meta device."""
    model = _build_on_meta(config, place, MetaWeights())
    assert isinstance(model, Transformer), place
    return model


def sites_of_other_stages(config: ModelConfig, place: MeshRank) -> Sequence[Site]:
    """The products that adapters may update on the ranks at the same place in the other pipeline stages."""
    linears = AdaptedLinears()
    for stage in range(place.mesh.pipeline):
        if stage != place.pipeline:
            _build_on_meta(config, place.in_stage(stage), MetaWeights(), linears)
    return linears.sites


def _build_on_meta(
    config: ModelConfig, place: MeshRank, weights: MetaWeights, linears: LinearForms | None = None
) -> Stage:
    operations = reference_operations(torch.device("meta"), torch.float32)
    return build_stage(config, place, weights, SoloComm(), operations, torch.float32, linears)


def check_mesh(config: ModelConfig, place: MeshRank) -> None:
    """Raises ValueError where a rank would be left without a layer, a head, a column or a word."""
    mesh, sizes = place.mesh, config.sizes
    if mesh.data > 1:
        raise ValueError(f"{mesh}: ranks share a model along the tensor and pipeline axes only")
    if mesh.pipeline > len(config.layers):
        raise ValueError(f"pipeline_parallel_size is {mesh.pipeline}; this model has {len(config.layers)} layers")
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
