"""Splits cover everything once, evenly; rotary frequencies equal transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.rotary import inverse_frequencies, rotary_table
from tensorweave.workers.models.shards import shard_heads, split_evenly


@given(st.integers(0, 500), st.integers(1, 40))
def test_even_splits_cover_all_and_differ_by_one(total: int, parts: int) -> None:
    ranges = split_evenly(total, parts)
    assert [i for part in ranges for i in part] == list(range(total))
    assert len(ranges) == parts
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_every_query_head_reads_its_own_kv_head(num_kv_heads: int, group: int, data: st.DataObject) -> None:
    num_heads = num_kv_heads * group
    size = data.draw(st.integers(1, num_heads))
    shards = shard_heads(num_heads, num_kv_heads, size)
    assert [head for shard in shards for head in shard.query] == list(range(num_heads))
    for shard in shards:
        assert len(shard.read_heads) * shard.group_size == len(shard.query) > 0
        assert [shard.kv[shard.read_heads[i // shard.group_size]] for i in range(len(shard.query))] == [
            head // group for head in shard.query
        ]
    if size <= num_kv_heads:
        assert sum(len(shard.kv) for shard in shards) == num_kv_heads


def test_smollm2_at_two_splits_on_groups() -> None:
    first, second = shard_heads(9, 3, 2)
    assert (first.query, first.kv, first.group_size) == (range(6), range(2), 3)
    assert (second.query, second.kv, second.group_size) == (range(6, 9), range(2, 3), 3)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "truncate": False,
            "beta_fast": 16.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 0.7},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    ],
)
def test_frequencies_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    parameters = {"rope_theta": 500000.0, **parameters}
    theirs = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=dict(parameters))
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"))
    rope = RopeConfig.from_hf({"rope_parameters": parameters}, 131072, "config.json")
    torch.testing.assert_close(inverse_frequencies(rope, 128), expected, rtol=1e-6, atol=0.0)
    assert rope.attention_factor == pytest.approx(factor)


def test_the_table_holds_scaled_cosines_then_sines() -> None:
    table = rotary_table(
        RopeConfig("yarn", factor=4.0, original_max_len=64, attention_factor=2.0), 8, 10, torch.device("cpu")
    )
    assert table.shape == (10, 8)
    assert table[0].tolist() == [2.0] * 4 + [0.0] * 4
