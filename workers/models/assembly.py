"""From a `ModelConfig` to a `Transformer`: the layers as their family builds them, the embedding before and the output
head behind them.

What a model asks for while it is built is also what its checkpoint must have (`tensor_shapes`) and what a rank keeps
(`count_weights`): both are found by building it without memory.
"""

from __future__ import annotations

import torch

from tensorweave.cluster.mesh import MeshRank
from tensorweave.kernels.operations import Operations, reference_operations
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.models.checkpoint import Shapes
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.layers import OutputHead, RmsNorm, SplitVocabEmbedding, VocabEmbedding
from tensorweave.workers.models.rank_weights import MetaWeights, RankWeights, TensorRows
from tensorweave.workers.models.shards import split_evenly
from tensorweave.workers.models.stack import make_stack
from tensorweave.workers.models.tensor_names import EMBEDDING, FINAL_NORM, HEAD
from tensorweave.workers.models.transformer import Transformer


def build_transformer(
    config: ModelConfig, place: MeshRank, weights: RankWeights, comm: Comm, operations: Operations
) -> Transformer:
    """Read one rank's share of the weights and put the layers around it."""
    sizes = config.sizes
    shares = split_evenly(sizes.vocab_size, place.mesh.tensor)
    vocab = shares[place.tensor]
    shape = (sizes.vocab_size, sizes.hidden_size)
    embedding_VD = weights.rows([TensorRows(EMBEDDING, shape, vocab)])
    layers = [
        layer.build(LayerBuilder(f"model.layers.{i}", sizes, weights, place, comm, operations))
        for i, layer in enumerate(config.layers)
    ]
    is_tied = config.has_tied_embeddings
    head_VD = weights.tied_head(embedding_VD) if is_tied else weights.matrix_rows([TensorRows(HEAD, shape, vocab)])
    final_norm_D = weights.vector(FINAL_NORM, sizes.hidden_size)
    has_all_words = len(vocab) == sizes.vocab_size
    return Transformer(
        embedding=VocabEmbedding(embedding_VD)
        if has_all_words
        else SplitVocabEmbedding(embedding_VD, vocab.start, comm),
        stack=make_stack(layers, has_whole_layers=place.mesh.tensor == 1),
        final_norm=RmsNorm(operations.add_rms_norm, final_norm_D, sizes.norm_epsilon),
        head=OutputHead(operations.make_linear(head_VD, None), tuple(len(share) for share in shares), comm),
    )


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Every tensor that a checkpoint of this model must have."""
    return count_weights(config, MeshRank()).shapes


def count_weights(config: ModelConfig, place: MeshRank) -> MetaWeights:
    """What the rank at `place` asks for of a checkpoint."""
    weights = MetaWeights()
    operations = reference_operations(torch.device("meta"), torch.float32)
    build_transformer(config, place, weights, SoloComm(), operations)
    return weights


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
