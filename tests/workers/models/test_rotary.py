"""Rotation frequencies equal transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tensorweave.workers.models.rope_config import RopeConfig
from tensorweave.workers.models.rotary import inverse_frequencies, rotary_table


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
