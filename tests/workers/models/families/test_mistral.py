"""Mistral's keys."""

from __future__ import annotations

from typing import Any

import pytest

from tests.workers.models.families.reading import biases, read


def test_one_window_in_every_layer() -> None:
    assert biases(read("MistralForCausalLM")) == set()
    assert read("MistralForCausalLM").windows == (4096,) * 4
    assert read("MistralForCausalLM", sliding_window=None).windows == (None,) * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; supported: false, which mistral"),
        (
            {"use_sliding_window": False, "sliding_window": 64},
            "use_sliding_window is False; supported: true where sliding_window is given",
        ),
        (
            {"layer_types": ["full_attention"] * 4},
            "layer_types is .* supported: the same kind in every layer for Mistral",
        ),
    ],
)
def test_keys_that_are_not_read_must_say_what_is_so(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read("MistralForCausalLM", **fields)
