"""Llama's keys and tensors."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.workers.models.rope_config import RopeConfig
from tests.workers.models.families.reading import MLP, QKV, biases, read


def test_llama_with_defaults() -> None:
    config = read()
    sizes = config.sizes
    assert (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.norm_epsilon) == (8, 2, 8, 1e-6)
    assert config.windows == (None,) * 4
    assert biases(config) == set()
    assert config.has_tied_embeddings is False
    assert config.ropes == (RopeConfig(),)
    assert config.checkpoint_dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "expected"), [({"attention_bias": True}, {*QKV, "o_proj"}), ({"mlp_bias": True}, MLP)]
)
def test_llama_biases(fields: dict[str, bool], expected: set[str]) -> None:
    assert biases(read(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 16}, "sliding_window is 16; supported: null for Llama"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is .*; supported: full_attention in every layer"),
    ],
)
def test_windows_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read(**fields)


def test_a_window_that_no_position_leaves_changes_nothing() -> None:
    assert read(sliding_window=512, max_window_layers=2, use_sliding_window=False) == read()
