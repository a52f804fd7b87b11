"""Reading config.json: both spellings of transformers, what each family leaves unsaid, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from tensorweave.workers.models.assembly import tensor_shapes
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.table import load_model_config, read_model_config
from tensorweave.workers.models.rope_config import RopeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def read(architecture: str = "LlamaForCausalLM", **fields: Any) -> ModelConfig:
    return read_model_config({"architectures": [architecture], **SIZES, **fields}, "some/config.json")


QKV = {"q_proj", "k_proj", "v_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def biases(config: ModelConfig) -> set[str]:
    """The linear layers of layer 0 that have one."""
    names = (name for name in tensor_shapes(config) if name.startswith("model.layers.0."))
    return {name.split(".")[-2] for name in names if name.endswith(".bias")}


def has_head_norms(config: ModelConfig) -> bool:
    norms = {f"model.layers.0.self_attn.{kind}_norm.weight" for kind in "qk"}
    return norms <= tensor_shapes(config).keys()


def test_llama_with_defaults() -> None:
    config = read()
    sizes = config.sizes
    assert (sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.norm_epsilon) == (8, 2, 8, 1e-6)
    assert config.windows == (None,) * 4
    assert biases(config) == set()
    assert config.has_tied_embeddings is False
    assert config.rope == RopeConfig()
    assert config.checkpoint_dtype == "float32"


@pytest.mark.parametrize("value", [None, 8])
def test_kv_heads_default_to_all_heads(value: int | None) -> None:
    assert read(num_key_value_heads=value).sizes.num_kv_heads == 8


@pytest.mark.parametrize("kind", [{}, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_both_spellings_of_rope_mean_the_same(kind: dict[str, Any]) -> None:
    old = dict(kind)
    if "rope_type" in old and old["rope_type"] == "linear":
        old["type"] = old.pop("rope_type")
    assert read(rope_theta=5e5, rope_scaling=old or None) == read(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, **kind}
    )


def test_old_and_new_names_of_the_dtype() -> None:
    assert read(torch_dtype="bfloat16") == read(dtype="bfloat16")


def test_yarn_states_its_length_before_stretching() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = read("Qwen2ForCausalLM", rope_scaling=scaling)
    assert config.max_seq_len == 2048
    assert config.rope.attention_factor == pytest.approx(1.1386294361)
    explicit = read("Qwen2ForCausalLM", rope_scaling={**scaling, "attention_factor": 0.5})
    assert explicit.rope.attention_factor == 0.5


@pytest.mark.parametrize(
    ("fields", "expected"), [({"attention_bias": True}, {*QKV, "o_proj"}), ({"mlp_bias": True}, MLP)]
)
def test_llama_biases(fields: dict[str, bool], expected: set[str]) -> None:
    assert biases(read(**fields)) == expected


def test_qwen2_has_qkv_biases_and_qwen3_head_norms() -> None:
    qwen2, qwen3 = read("Qwen2ForCausalLM"), read("Qwen3ForCausalLM")
    assert (biases(qwen2), has_head_norms(qwen2)) == (QKV, False)
    assert (biases(qwen3), has_head_norms(qwen3), qwen3.sizes.head_dim) == (set(), True, 128)
    assert read("Qwen3ForCausalLM", head_dim=16).sizes.head_dim == 16


def test_windows() -> None:
    assert read("MistralForCausalLM").windows == (4096,) * 4
    assert read("MistralForCausalLM", sliding_window=None).windows == (None,) * 4
    assert read("Qwen2ForCausalLM", sliding_window=9).windows == (None,) * 4
    some = {"use_sliding_window": True, "sliding_window": 9}
    assert read("Qwen2ForCausalLM", **some, max_window_layers=3).windows == (None, None, None, 9)
    types = ["sliding_attention", "full_attention"] * 2
    assert read("Qwen3ForCausalLM", **some, layer_types=types).windows == (9, None, 9, None)


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
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config is .*awq.*; supported: checkpoints that are not",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling has rope_type 'dynamic'; supported: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2', must be a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling has unknown key 'beta'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
        ({"vocab_size": None}, "vocab_size is None; supported: a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; supported: a whole number"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3; supported: a divisor of num_attention_heads \(8\)"),
        ({"hidden_size": 60}, "num_attention_heads is 8; supported: a divisor of hidden_size"),
        ({"head_dim": 7}, "head_dim is 7; supported: an even size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; supported: true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; supported: float32, bfloat16, float16"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; supported: a token id or a list"),
        ({"sliding_window": 16}, "sliding_window is 16; supported: null for Llama"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is .*; supported: full_attention in every layer"),
        ({"model_type": "gemma"}, "model_type is 'gemma'; supported: 'llama' for this architecture"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, r"torch_dtype is 'float16'; supported: the same as dtype"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling has rope_type 'default' and type"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.rope_theta is 10000 and rope_theta on top of the file 500000; keep one",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is .*linear.* beside rope_parameters .*, which means another rotation; keep one of them",
        ),
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
def test_refusals_name_file_key_value_and_what_is_supported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read(**fields)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("MistralForCausalLM", {"attention_bias": True}, "attention_bias is True; supported: false, which mistral"),
        ("Qwen2ForCausalLM", {"attention_bias": False}, "attention_bias is False; supported: true, which qwen2"),
        ("Qwen3ForCausalLM", {"mlp_bias": True}, "mlp_bias is True; supported: false, which qwen3"),
        (
            "MistralForCausalLM",
            {"use_sliding_window": False, "sliding_window": 64},
            "use_sliding_window is False; supported: true where sliding_window is given",
        ),
    ],
)
def test_keys_that_a_family_does_not_read_must_say_what_is_so(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"some/config.json: {message}"):
        read(architecture, **fields)


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


def test_both_spellings_of_rope_may_stand_together_when_they_agree() -> None:
    both = read(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert both == read(rope_theta=5e5, rope_scaling=LLAMA3)


def test_layer_types_must_agree_with_the_family() -> None:
    with pytest.raises(ValueError, match=r"layer_types is .* supported: full_attention, and sliding_attention where"):
        read("Qwen3ForCausalLM", layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match=r"layer_types is .* supported: the same kind in every layer for Mistral"):
        read("MistralForCausalLM", layer_types=["full_attention"] * 4)
    with pytest.raises(ValueError, match=r"layer_types is .* supported: one entry for each of 4 layers"):
        read("Qwen2ForCausalLM", layer_types=["full_attention"])


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
