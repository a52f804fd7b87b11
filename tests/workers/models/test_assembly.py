"""What a model asks for while it is built is what its checkpoint has; which meshes can share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.models.assembly import (
    check_mesh,
    count_weights,
    stage_layers,
    tensor_shapes,
    weights_per_layer,
)
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.shards import split_evenly
from tensorweave.workers.models.stacked_experts import StackedExperts
from tests.workers.tiny_models import MODELS, make_model


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path)
    config = load_model_config(tmp_path)
    with SafetensorsDirectory(tmp_path) as source:
        shapes = StackedExperts(source).shapes if config.has_stacked_experts else source.shapes
        assert tensor_shapes(config) == shapes


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_share_all_matrices(size: int, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path, num_key_value_heads=6)
    config = load_model_config(tmp_path)
    whole = count_weights(config, MeshRank())
    parts = [count_weights(config, place) for place in Mesh(tensor=size).ranks()]
    assert sum(part.num_multiplied for part in parts) == whole.num_multiplied
    assert sum(part.num_looked_up for part in parts) == whole.num_looked_up
    assert all(part.shapes.items() <= whole.shapes.items() for part in parts)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("mesh", [Mesh(pipeline=2), Mesh(pipeline=3), Mesh(tensor=2, pipeline=2)], ids=str)
def test_stages_have_different_layers(mesh: Mesh, is_tied: bool, tmp_path: Path) -> None:
    make_model("qwen3", tmp_path, tie_word_embeddings=is_tied, num_hidden_layers=5)
    config = load_model_config(tmp_path)
    whole = count_weights(config, MeshRank())
    parts = [count_weights(config, place) for place in mesh.ranks()]
    assert sum(part.num_multiplied for part in parts) == whole.num_multiplied
    assert sum(part.num_looked_up for part in parts) == whole.num_looked_up * (2 if is_tied else 1)
    names = [name for part in parts[:: mesh.tensor] for name in part.shapes if is_tied is False or "embed" not in name]
    assert sorted(names) == sorted(name for name in whole.shapes if is_tied is False or "embed" not in name)
    assert len(stage_layers(config, mesh.ranks()[0])) == -(-5 // mesh.pipeline)


def test_weights_of_a_layer_are_those_of_its_products_on_one_rank(tmp_path: Path) -> None:
    make_model("llama", tmp_path, num_hidden_layers=3, num_key_value_heads=2, num_attention_heads=4)
    config = load_model_config(tmp_path)
    sizes = config.sizes
    D, H, width = sizes.hidden_size, config.kv.head_dim, sizes.intermediate_size
    whole = D * H * (4 + 2 * 2) + H * 4 * D + 3 * D * width
    assert weights_per_layer(config, Mesh()) == whole
    assert weights_per_layer(config, Mesh(tensor=2)) == whole // 2
    assert weights_per_layer(config, Mesh(pipeline=2)) == whole


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(data=2), "ranks share a model along the tensor and pipeline axes only"),
        (Mesh(pipeline=4), "pipeline_parallel_size is 4; this model has 3 layers"),
        (Mesh(tensor=2, expert=2), "moe_expert_parallel_size is 2; this model has no experts to share"),
        (Mesh(tensor=7), "tensor_parallel_size is 7; this model has 6 attention heads to share"),
    ],
)
def test_what_cannot_be_shared_is_refused(mesh: Mesh, message: str, tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(ValueError, match=message):
        check_mesh(load_model_config(tmp_path), MeshRank(0, mesh))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(tensor=4, expert=4), "moe_expert_parallel_size is 4; this model has 3 experts"),
        (Mesh(tensor=6, expert=2), "moe_tensor_parallel_size is 3; an expert of this model is 2 wide"),
        (Mesh(tensor=6, expert=3), "tensor_parallel_size is 6; this model's shared expert is 5 wide"),
    ],
)
def test_experts_that_cannot_be_shared_are_refused(mesh: Mesh, message: str, tmp_path: Path) -> None:
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 2}
    make_model("qwen2_moe", tmp_path, **sizes, shared_expert_intermediate_size=5)
    config = load_model_config(tmp_path)
    check_mesh(config, MeshRank(0, Mesh(tensor=3, expert=3)))
    with pytest.raises(ValueError, match=message):
        check_mesh(config, MeshRank(0, mesh))


@pytest.mark.parametrize("mesh", [Mesh(tensor=2, expert=2), Mesh(tensor=4, expert=2), Mesh(tensor=3)])
def test_each_rank_reads_its_experts_alone(mesh: Mesh, tmp_path: Path) -> None:
    make_model("qwen2_moe", tmp_path, num_key_value_heads=6)
    config = load_model_config(tmp_path)
    whole = count_weights(config, MeshRank())
    parts = [count_weights(config, place) for place in mesh.ranks()]
    assert sum(part.num_multiplied for part in parts) == whole.num_multiplied
    for place, part in zip(mesh.ranks(), parts, strict=True):
        numbers = {int(name.split(".")[5]) for name in part.shapes if ".mlp.experts." in name}
        assert numbers == set(split_evenly(7, mesh.expert)[place.expert])
