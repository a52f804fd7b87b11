"""Rotations as config.json states them, in both spellings."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workers.models.families.reading import read

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("kind", [{}, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_both_spellings_of_rope_mean_the_same(kind: dict[str, Any]) -> None:
    old = dict(kind)
    if "rope_type" in old and old["rope_type"] == "linear":
        old["type"] = old.pop("rope_type")
    assert read(rope_theta=5e5, rope_scaling=old or None) == read(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, **kind}
    )


def test_both_spellings_of_rope_may_stand_together_when_they_agree() -> None:
    both = read(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert both == read(rope_theta=5e5, rope_scaling=LLAMA3)


def test_yarn_states_its_length_before_stretching() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = read("Qwen2ForCausalLM", rope_scaling=scaling)
    assert config.max_seq_len == 2048
    assert config.ropes[0].attention_factor == pytest.approx(1.1386294361)
    explicit = read("Qwen2ForCausalLM", rope_scaling={**scaling, "attention_factor": 0.5})
    assert explicit.ropes[0].attention_factor == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling has rope_type 'dynamic'; supported: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2', must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling has unknown key 'beta'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling has rope_type 'default' and type"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.rope_theta is 10000 and rope_theta on top of the file 500000; keep one",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is .*linear.* beside rope_parameters .*, which means another rotation; keep one of them",
        ),
    ],
)
def test_refusals_name_file_key_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read(**fields)
