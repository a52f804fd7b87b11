"""Phi-3's keys and tensors, and its rotations of part of a head in two sets."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.config import ModelConfig
from tests.workers.models.families.reading import read

PHI4_MINI: dict[str, Any] = {
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2, 3]},
}


def read_phi3(**fields: Any) -> ModelConfig:
    return read("Phi3ForCausalLM", **fields)


def test_queries_keys_and_values_are_one_tensor() -> None:
    shapes = tensor_shapes(read_phi3())
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (12 * 8, 64)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 96, 64)
    assert read_phi3().sizes.norm_epsilon == 1e-5


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_longrope_under_its_old_names(name: str) -> None:
    scaling = {**PHI4_MINI["rope_scaling"], "type": name}
    config = read_phi3(**{**PHI4_MINI, "rope_scaling": scaling}, sliding_window=9)
    [rope] = config.ropes
    assert (rope.kind, rope.part, rope.original_max_len, rope.long_factors) == ("longrope", 0.5, 64, (2.0, 3.0))
    assert rope.attention_factor == pytest.approx(1.22474487)  # sqrt(1 + ln 8 / ln 64)
    assert config.windows == (9,) * 4
    assert read_phi3(sliding_window=512).windows == (None,) * 4


def test_sequences_end_where_longrope_changes_unless_more_is_asked_for() -> None:
    config = read_phi3(**PHI4_MINI)
    assert (config.max_seq_len, config.default_seq_len) == (512, 64)


def test_code_of_its_own_that_transformers_has_too() -> None:
    read_phi3(auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    with pytest.raises(ValueError, match="auto_map names the repository's own code"):
        read_phi3(auto_map={"AutoModelForCausalLM": "modeling_phi5.Phi3ForCausalLM"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; supported: false, which phi3"),
        ({"partial_rotary_factor": 0.3}, "partial_rotary_factor 0.3 of a head_dim of 8 with lists of \\[2\\] factors"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5 and .* supported: the same number, at most 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is .*linear.*; supported: longrope"),
        ({"rope_scaling": {"type": "su", "short_factor": [1]}}, "rope_scaling.long_factor is None, must be a list of"),
        ({"full_attn_mod": 2}, "full_attn_mod is 2, a key that may change what the model computes"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_phi3(**{**PHI4_MINI, **fields})
