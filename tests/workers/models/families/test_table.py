"""Reading config.json: what is read alike for every family, and how refusals name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorweave.workers.models.families.table import load_model_config
from tests.workers.models.families.reading import SIZES, read


@pytest.mark.parametrize("value", [None, 8])
def test_kv_heads_default_to_all_heads(value: int | None) -> None:
    assert read(num_key_value_heads=value).sizes.num_kv_heads == 8


def test_old_and_new_names_of_the_dtype() -> None:
    assert read(torch_dtype="bfloat16") == read(dtype="bfloat16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures is \['GPT2LMHeadModel'\]; supported: LlamaForCausalLM, Mistral",
        ),
        (
            {"architectures": None, "model_type": "gpt2"},
            "model_type is 'gpt2'; supported: llama, mistral, qwen2, qwen3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quantization_config.quant_method is 'hqq'; supported: awq, compressed-tensors",
        ),
        ({"vocab_size": None}, "vocab_size is None; supported: a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; supported: a whole number"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3; supported: a divisor of num_attention_heads \(8\)"),
        ({"hidden_size": 60}, "num_attention_heads is 8; supported: a divisor of hidden_size"),
        ({"head_dim": 7}, "head_dim is 7; supported: an even size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; supported: true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; supported: float32, bfloat16, float16"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; supported: a token id or a list"),
        ({"model_type": "gemma"}, "model_type is 'gemma'; supported: 'llama' for this architecture"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, r"torch_dtype is 'float16'; supported: the same as dtype"),
    ],
)
def test_refusals_name_file_key_value_and_what_is_supported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read(**fields)


def test_model_type_stands_in_for_architectures() -> None:
    assert read(architectures=None, model_type="mistral").architecture == "MistralForCausalLM"


def test_an_end_id_outside_the_vocabulary_ends_nothing() -> None:
    assert read(eos_token_id=[5, 100]).end_ids == (5,)


def test_end_ids_of_both_files(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SIZES, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model_config(tmp_path).end_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert load_model_config(tmp_path).end_ids == (5, 9)


def test_a_directory_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list, must be an object"):
        load_model_config(tmp_path)
