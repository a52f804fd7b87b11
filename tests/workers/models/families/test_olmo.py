"""OLMo's norms, and OLMo 3's two kinds of layers."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.workers.models.assembly import tensor_shapes
from tests.workers.models.families.reading import QKV, biases, read

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


def test_norms_are_behind_and_over_all_heads() -> None:
    shapes = tensor_shapes(read("Olmo2ForCausalLM"))
    norms = {name.removeprefix("model.layers.0."): shape for name, shape in shapes.items() if "layers.0" in name}
    assert {name: shape for name, shape in norms.items() if "norm" in name} == {
        "post_attention_layernorm.weight": (64,),
        "post_feedforward_layernorm.weight": (64,),
        "self_attn.q_norm.weight": (64,),
        "self_attn.k_norm.weight": (16,),
    }
    assert biases(read("Olmo2ForCausalLM", attention_bias=True)) == {*QKV, "o_proj"}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": YARN},
        {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }
        },
    ],
)
def test_windows_are_rotated_without_the_scaling_of_the_others(fields: dict[str, Any]) -> None:
    config = read("Olmo3ForCausalLM", sliding_window=5, **fields)
    assert config.windows == (5, 5, 5, None)
    assert [config.ropes[layer.kv.rope].kind for layer in config.layers] == ["default"] * 3 + ["yarn"]
    assert {rope.theta for rope in config.ropes} == {5e5}
    assert config.max_seq_len == 512


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"rope_parameters is .*; supported: an object for each of full_attention, sli"
    ):
        read("Olmo3ForCausalLM", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    with pytest.raises(ValueError, match="sliding_window is None; supported: a whole number of at least 1"):
        read("Olmo3ForCausalLM", sliding_window=None)
