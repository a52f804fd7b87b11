"""Granite's factors, and the dense models among its hybrids."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.families.granite import GraniteLayer
from tests.workers.models.families.reading import QKV, biases, read

FACTORS = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
}
DENSE: dict[str, Any] = {
    "layer_types": ["attention"] * 4,
    "mamba_n_heads": 128,
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
}


@pytest.mark.parametrize(
    ("architecture", "fields"), [("GraniteForCausalLM", {}), ("GraniteMoeHybridForCausalLM", DENSE)]
)
def test_factors(architecture: str, fields: dict[str, Any]) -> None:
    config = read(architecture, **FACTORS, **fields)
    layer = config.layers[0]
    assert isinstance(layer, GraniteLayer)
    assert (layer.scale, layer.update_factor) == (0.25, 0.22)
    assert (config.ends.embedding_factor, config.ends.logit_factor) == (12, 0.125)
    plain = read(architecture, **fields)
    assert (plain.ends.embedding_factor, plain.ends.logit_factor) == (1, 1)


def test_biases() -> None:
    assert biases(read("GraniteForCausalLM", attention_bias=True)) == {*QKV, "o_proj"}


def test_dense_hybrids_have_a_shared_mlp_and_perhaps_no_rotation() -> None:
    config = read("GraniteMoeHybridForCausalLM", **DENSE)
    assert tensor_shapes(config)["model.layers.0.shared_mlp.input_linear.weight"] == (80, 64)
    assert [rope.kind for rope in config.ropes] == ["none"]
    rotated = read("GraniteMoeHybridForCausalLM", **DENSE, position_embedding_type="rope")
    assert [rope.kind for rope in rotated.ropes] == ["default"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["mamba"] * 4}, r"layer_types is \['mamba'.*; supported: attention in every layer"),
        ({"layer_types": None}, "layer_types is None; supported: attention in every layer"),
        ({"num_local_experts": 4}, "num_local_experts is 4; supported: 0"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; supported: rope, nope"),
        ({"residual_multiplier": 0}, "residual_multiplier is 0; supported: a number above 0"),
        ({"normalization_function": "layernorm"}, "normalization_function is 'layernorm'; supported: rmsnorm"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("GraniteMoeHybridForCausalLM", **{**DENSE, **fields})
