"""Qwen2's keys and tensors."""

from __future__ import annotations

import pytest

from tests.workers.models.families.reading import QKV, biases, has_head_norms, read


def test_biases_on_q_k_and_v_alone() -> None:
    config = read("Qwen2ForCausalLM")
    assert (biases(config), has_head_norms(config)) == (QKV, False)
    with pytest.raises(ValueError, match="attention_bias is False; supported: true, which qwen2"):
        read("Qwen2ForCausalLM", attention_bias=False)


def test_windows_in_the_later_layers() -> None:
    assert read("Qwen2ForCausalLM", sliding_window=9).windows == (None,) * 4
    some = {"use_sliding_window": True, "sliding_window": 9}
    assert read("Qwen2ForCausalLM", **some, max_window_layers=3).windows == (None, None, None, 9)
    with pytest.raises(ValueError, match=r"layer_types is .* supported: one entry for each of 4 layers"):
        read("Qwen2ForCausalLM", layer_types=["full_attention"])
