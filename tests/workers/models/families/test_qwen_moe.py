"""The keys and tensors of Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.llama import LlamaLayer
from tests.workers.models.families.reading import QKV, biases, has_head_norms, read

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9}


def read_qwen2(**fields: Any) -> ModelConfig:
    return read("Qwen2MoeForCausalLM", **{**EXPERTS, "shared_expert_intermediate_size": 40, **fields})


def read_qwen3(**fields: Any) -> ModelConfig:
    return read("Qwen3MoeForCausalLM", **{**EXPERTS, **fields})


def sparse_layers(config: ModelConfig) -> list[int]:
    names = tensor_shapes(config)
    return [i for i in range(4) if f"model.layers.{i}.mlp.gate.weight" in names]


def test_qwen2s_tensors() -> None:
    shapes = tensor_shapes(config := read_qwen2(head_dim=None))
    prefix = "model.layers.0.mlp"
    assert shapes[f"{prefix}.experts.5.down_proj.weight"] == (64, 24)
    assert shapes[f"{prefix}.shared_expert.down_proj.weight"] == (64, 40)
    assert (shapes[f"{prefix}.gate.weight"], shapes[f"{prefix}.shared_expert_gate.weight"]) == ((6, 64), (1, 64))
    assert (biases(config), has_head_norms(config)) == (QKV, False)
    assert biases(read_qwen2(qkv_bias=False)) == set()


def test_qwen3s_tensors() -> None:
    shapes = tensor_shapes(config := read_qwen3(head_dim=16))
    assert shapes["model.layers.0.mlp.experts.5.up_proj.weight"] == (24, 64)
    assert not any("shared" in name for name in shapes)
    assert (biases(config), has_head_norms(config)) == (set(), True)
    assert biases(read_qwen3(head_dim=16, attention_bias=True)) == {*QKV, "o_proj"}


def test_transformers_writes_the_number_of_experts_under_another_name() -> None:
    assert read_qwen3(num_experts=None, num_local_experts=6) == read_qwen3()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3, 7]}, [1]),
    ],
)
def test_some_layers_are_dense(fields: dict[str, Any], expected: list[int]) -> None:
    assert sparse_layers(read_qwen2(**fields)) == expected
    config = read_qwen3(**fields)
    assert sparse_layers(config) == expected
    dense = set(range(4)) - set(expected)
    shapes = tensor_shapes(config)
    assert {i for i in range(4) if shapes.get(f"model.layers.{i}.mlp.up_proj.weight") == (96, 64)} == dense


@pytest.mark.parametrize("is_renormalized", [False, True])
def test_routing(is_renormalized: bool) -> None:
    for config in (read_qwen2(norm_topk_prob=is_renormalized), read_qwen3(norm_topk_prob=is_renormalized)):
        layer = config.layers[0]
        assert isinstance(layer, LlamaLayer)
        assert layer.mixture is not None
        assert layer.mixture.routing.is_renormalized is is_renormalized
        assert layer.mixture.routing.is_rounded


def test_qwen2s_windows_are_in_every_other_of_the_first_layers() -> None:
    assert read_qwen2(sliding_window=9, max_window_layers=3).windows == (None,) * 4
    assert read_qwen2(**WINDOWS).windows == (9, None, 9, None)
    assert read_qwen2(**WINDOWS, max_window_layers=2).windows == (9, None, None, None)
    types = ["full_attention", "sliding_attention"] * 2
    assert read_qwen2(**WINDOWS, layer_types=types).windows == (None, 9, None, 9)


def test_qwen3s_window_is_in_every_layer() -> None:
    assert read_qwen3(sliding_window=9, max_window_layers=3).windows == (None,) * 4
    assert read_qwen3(**WINDOWS, max_window_layers=2).windows == (9,) * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None; supported: a whole number"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; supported: a whole number of at least 1"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3; supported: a list of layer numbers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; supported: true or false"),
        ({"layer_types": ["full_attention"] * 4, **WINDOWS}, "layer_types is .* same kind in every layer"),
        ({"shared_expert_intermediate_size": 40}, "shared_expert_intermediate_size is 40, a key that may change"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read_qwen3(**fields)
