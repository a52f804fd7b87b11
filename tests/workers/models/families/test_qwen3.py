"""Qwen3's keys and tensors."""

from __future__ import annotations

import pytest

from tests.workers.models.families.reading import QKV, biases, has_head_norms, read


def test_norms_over_heads_of_their_own_size() -> None:
    config = read("Qwen3ForCausalLM")
    assert (biases(config), has_head_norms(config), config.sizes.head_dim) == (set(), True, 128)
    assert read("Qwen3ForCausalLM", head_dim=16).sizes.head_dim == 16


def test_biases() -> None:
    assert biases(read("Qwen3ForCausalLM", attention_bias=True)) == {*QKV, "o_proj"}
    with pytest.raises(ValueError, match="mlp_bias is True; supported: false, which qwen3"):
        read("Qwen3ForCausalLM", mlp_bias=True)


def test_windows_in_the_layers_that_are_named() -> None:
    some = {"use_sliding_window": True, "sliding_window": 9}
    types = ["sliding_attention", "full_attention"] * 2
    assert read("Qwen3ForCausalLM", **some, layer_types=types).windows == (9, None, 9, None)
    with pytest.raises(ValueError, match=r"layer_types is .* supported: full_attention, and sliding_attention where"):
        read("Qwen3ForCausalLM", layer_types=["sliding_attention"] * 4)
