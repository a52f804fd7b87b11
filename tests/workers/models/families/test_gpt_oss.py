"""gpt-oss's keys and tensors."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.kernels.mixture.reference import Swiglu
from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.llama import LlamaLayer
from tests.workers.models.families.reading import QKV, biases, read

EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def read_gpt_oss(**fields: Any) -> ModelConfig:
    return read("GptOssForCausalLM", **{**EXPERTS, **fields})


def test_what_openais_files_leave_out() -> None:
    config = read_gpt_oss(experts_per_token=2, initial_context_length=4096, router_aux_loss_coef=0.9)
    assert config.checkpoint_dtype == "bfloat16"
    assert read_gpt_oss(torch_dtype="float32").checkpoint_dtype == "float32"
    assert (config.sizes.head_dim, config.sizes.norm_epsilon) == (64, 1e-5)
    [rope] = config.ropes
    assert (rope.kind, rope.theta, rope.factor, rope.truncate) == ("yarn", 150_000.0, 32.0, False)
    assert config.max_seq_len == 32 * 4096
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "truncate": False}
    assert read_gpt_oss(rope_scaling=scaling, rope_theta=5e5).ropes[0].factor == 8.0
    layer = config.layers[0]
    assert isinstance(layer, LlamaLayer)
    assert layer.mixture is not None
    assert layer.mixture.swiglu == Swiglu(alpha=1.702, limit=7.0, shift=1.0)
    routing = layer.mixture.routing
    assert (routing.num_chosen, routing.is_renormalized, routing.is_rounded) == (2, True, True)


def test_tensors() -> None:
    config = read_gpt_oss()
    shapes = tensor_shapes(config)
    assert shapes["model.layers.0.self_attn.sinks"] == (8,)
    assert shapes["model.layers.3.mlp.experts.7.down_proj.weight"] == (64, 96)
    assert (shapes["model.layers.0.mlp.router.weight"], shapes["model.layers.0.mlp.router.bias"]) == ((8, 64), (8,))
    assert biases(config) == {*QKV, "o_proj", "router", "gate_proj", "up_proj", "down_proj"}
    assert "q_proj" not in biases(read_gpt_oss(attention_bias=False))


def test_every_other_layer_has_a_window() -> None:
    assert read_gpt_oss().windows == (128, None, 128, None)
    assert read_gpt_oss(sliding_window=9, layer_types=["full_attention"] * 3 + ["sliding_attention"]).windows == (
        *(None,) * 3,
        9,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_token": 4}, r"experts_per_token is 4; supported: the same as num_experts_per_tok \(2\)"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0; supported: a number above 0"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True, a key that may change"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read_gpt_oss(**fields)
