"""Gemma's keys and tensors, its two kinds of layers, and the text part of larger models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.models.families.gemma import GemmaLayer
from tensorweave.workers.models.families.table import read_model_config
from tests.workers.engine_drive import generate_on_ranks, random_prompts
from tests.workers.models.families.reading import read
from tests.workers.tiny_models import MODELS, SHAPE, save_randomized, their_greedy

GELU = {"hidden_activation": "gelu_pytorch_tanh"}


def test_gemma2_has_soft_caps_and_windows_in_every_second_layer() -> None:
    config = read("Gemma2ForCausalLM", **GELU, head_dim=16, query_pre_attn_scalar=4, sliding_window=9)
    layer = config.layers[0]
    assert isinstance(layer, GemmaLayer)
    assert (layer.scale, layer.soft_cap, layer.has_head_norms) == (0.5, 50.0, False)
    assert config.windows == (9, None) * 2
    assert (config.ends.embedding_factor, config.ends.logit_cap) == (8.0, 30.0)
    assert (config.sizes.norm_offset, config.has_tied_embeddings, len(config.ropes)) == (1.0, True, 1)
    both = {"sliding_window": 4096, "sliding_window_size": 4096, "cache_implementation": "hybrid"}  # Google's own files
    assert read("Gemma2ForCausalLM", **GELU, hidden_act="gelu_pytorch_tanh", **both).windows == (4096, None) * 2
    assert read("Gemma2ForCausalLM", final_logit_softcapping=None).ends.logit_cap is None


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
)
def test_gemma3_rotates_windows_by_another_base(fields: dict[str, Any]) -> None:
    config = read("Gemma3ForCausalLM", **fields, sliding_window=7, sliding_window_pattern=2)
    assert config.windows == (7, None) * 2
    bases = [config.ropes[layer.kv.rope] for layer in config.layers]
    assert [(rope.kind, rope.theta) for rope in bases] == [("default", 1e4), ("linear", 1e6)] * 2
    assert config.max_seq_len == 512  # the factor is in it already


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; supported: gelu_pytorch_tanh"),
        ({"sliding_window_size": 9}, "sliding_window_size is 9; supported: the same as sliding_window"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'; supported: gelu_pytorch_tanh"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; supported: null for Gemma 3"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True, a key that may change"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("Gemma3ForCausalLM", **fields)


def test_a_text_config_says_little() -> None:
    """As those of the 4B, 12B and 27B models."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    outside = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    config = read_model_config({**outside, "text_config": text, "vision_config": {"hidden_size": 1152}})
    sizes = config.sizes
    assert (sizes.vocab_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim) == (262_208, 8, 4, 256)
    assert (config.windows.count(None), config.windows[:6]) == (5, (4096,) * 5 + (None,))
    assert (config.max_seq_len, config.end_ids) == (131_072, (1, 106))


def test_the_text_model_of_a_model_with_vision(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**SHAPE, **MODELS["gemma3"][2]},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = save_randomized(Gemma3ForConditionalGeneration(config), tmp_path / "model")
    prompts = random_prompts(2, 60)
    expected = their_greedy(model, prompts, 6)
    assert generate_on_ranks(tmp_path / "model", 1, prompts, 6) == expected
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    assert generate_on_ranks(tmp_path / "engine", 1, prompts, 6) == expected
