"""Keys of a config.json that change nothing, and those that are refused because they may."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from tensorweave.workers.models.families.table import read_model_config
from tests.workers.models.families.reading import SIZES, read


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "own.Model"}},
            "auto_map names the repository's own code for AutoModelFor",
        ),
        ({"qk_norm": True}, "qk_norm is True, a key that may change what the model computes and that is not supported"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, a key"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, a key"),
        ({"attention_multiplier": 0.0078125}, "attention_multiplier is 0.0078125, a key"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0, a key"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1, a key"),
        ({"no_rope_layers": [1, 1, 0, 1]}, "no_rope_layers is .*, a key"),
        ({"dual_chunk_attention_config": {"chunk_size": 9}}, "dual_chunk_attention_config is .*, a key"),
        ({"rope_interleaved": True}, "rope_interleaved is True, a key"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, a key"),
        ({"num_local_experts": 8}, "num_local_experts is 8, a key"),
    ],
)
def test_keys_that_may_change_the_model_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read(**fields)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_all_that_transformers_own_class_writes_is_known(config_class: type[PreTrainedConfig]) -> None:
    name = f"{config_class.__name__.removesuffix('Config')}ForCausalLM"
    sizes = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    fields = json.loads(config_class(**sizes, architectures=[name]).to_json_string(use_diff=False))
    assert read_model_config(fields).architecture == name


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": (
        "LlamaForCausalLM",
        {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}},
    ),
    "Llama 1": ("LlamaForCausalLM", {"max_sequence_length": 2048, "pad_token_id": -1, "pretraining_tp": 2}),
    "Qwen2.5": ("Qwen2ForCausalLM", {"use_mrope": False, "sliding_window": 131072, "use_sliding_window": False}),
    "a trainer's": (
        "MistralForCausalLM",
        {"unsloth_fixed": True, "_attn_implementation_autoset": True, "residual_dropout": 0.1, "use_flash_attn": True},
    ),
    "with sampling fields": ("LlamaForCausalLM", {"temperature": 0.6, "do_sample": True, "max_length": 4096}),
    "with a tokenizer's own code": ("LlamaForCausalLM", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}),
    "with features that are off": ("Qwen3ForCausalLM", {"qk_layernorm": False, "clip_qkv": None, "num_experts": 0}),
    "with neutral factors": ("LlamaForCausalLM", {"logits_scaling": 1.0, "residual_multiplier": 1}),
}


@pytest.mark.parametrize("name", REAL)
def test_what_real_checkpoints_carry_changes_nothing(name: str) -> None:
    architecture, fields = REAL[name]
    assert read(architecture, **fields) == read(architecture)
