"""Mixtral's keys and tensors."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.llama import LlamaLayer
from tests.workers.models.families.reading import SIZES, biases, read

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def read_mixtral(**fields: Any) -> ModelConfig:
    return read("MixtralForCausalLM", **{**EXPERTS, **fields})


def test_an_mlp_is_a_mixture() -> None:
    config = read_mixtral(router_jitter_noise=0.1, router_aux_loss_coef=0.02, output_router_logits=True)
    shapes = tensor_shapes(config)
    prefix = "model.layers.3.block_sparse_moe"
    assert shapes[f"{prefix}.gate.weight"] == (8, 64)
    assert [shapes[f"{prefix}.experts.7.w{n}.weight"] for n in (1, 2, 3)] == [(96, 64), (64, 96), (96, 64)]
    assert not any("mlp" in name for name in shapes)
    assert biases(config) == set()
    layer = config.layers[0]
    assert isinstance(layer, LlamaLayer)
    assert layer.mixture is not None
    routing = layer.mixture.routing
    assert (routing.num_chosen, routing.is_renormalized, routing.is_rounded) == (2, True, False)


def test_what_the_class_takes_where_the_file_does_not_say() -> None:
    config = read_mixtral()
    assert (config.sizes.norm_epsilon, config.ropes[0].theta) == (1e-5, 1e6)
    assert read_mixtral(rms_norm_eps=1e-6, rope_theta=1e4).ropes[0].theta == 1e4


def test_windows() -> None:
    assert read_mixtral().windows == (None,) * 4
    assert read_mixtral(sliding_window=100).windows == (100,) * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_local_experts": None}, "num_experts is None; supported: a whole number of at least 1"),
        ({"num_local_experts": 0}, "num_local_experts is 0; supported: a whole number of at least 1"),
        ({"num_experts": 7}, r"num_local_experts is 8; supported: the same as num_experts \(7\)"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9; supported: at most the number of experts \(8\)"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is .* supported: full_attention"),
        (
            {"layer_types": ["full_attention"] * 4, "sliding_window": 9},
            "layer_types is .* supported: the same kind in every layer for Mixtral",
        ),
        ({"attention_bias": True}, "attention_bias is True, a key that may change"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True, a key that may change"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    assert SIZES["num_hidden_layers"] == 4
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read_mixtral(**fields)
