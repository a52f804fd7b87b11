"""Small random models, made by transformers' own classes and written as Hugging Face directories."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCAB = 211
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
THETA = {"rope_theta": 10000.0}

TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONGROPE = {
    **THETA,
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 10 for i in range(12)],
    "long_factor": [2.0 + i for i in range(12)],
}

DENSE: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied_9_over_3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "llama_8_over_2": (LlamaConfig, LlamaForCausalLM, {"num_attention_heads": 8}),
    "llama_biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama_linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 3.0}},
    ),
    "llama_llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_theta": 500.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": 37}),
    "mistral_no_window": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_some_windows": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "num_key_value_heads": 6},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3_yarn": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "head_dim": 32,
            "rope_parameters": {
                **THETA,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "phi3_window": (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 0, "sliding_window": 29}),
    "phi4_mini": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "pad_token_id": 0,
            "hidden_size": 192,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 1024,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        },
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "head_dim": 32,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.4,
            "tie_word_embeddings": True,
        },
    ),
    "granite4": (
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "layer_types": ["full_attention"] * 3,
            "logits_scaling": 4.0,
            "mamba_n_heads": 6,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.4,
            "shared_intermediate_size": 74,
        },
    ),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"pad_token_id": 0, "head_dim": 32, "no_rope_layer_interval": 2}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"pad_token_id": 0}),
    "olmo3": (
        Olmo3Config,
        Olmo3ForCausalLM,
        {"pad_token_id": 0, "num_hidden_layers": 4, "sliding_window": 29, "rope_parameters": TWO_ROPES},
    ),
    "glm": (GlmConfig, GlmForCausalLM, {"pad_token_id": 0, "head_dim": 16}),
    "glm4": (Glm4Config, Glm4ForCausalLM, {"pad_token_id": 0, "head_dim": 32}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "attn_implementation": "eager",  # transformers before 5.24 chooses one that drops the soft cap
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "head_dim": 32,
            "query_pre_attn_scalar": 11,
            "sliding_window": 29,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 20,
            "rope_parameters": TWO_ROPES,
            "sliding_window": 29,
        },
    ),
}
EAGER = {"experts_implementation": "eager"}
"""Grouped products, transformers' default, take no sizes that are odd multiples of 8 bytes."""
MIXTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"intermediate_size": 40, "num_local_experts": 5}),
    "mixtral_window": (
        MixtralConfig,
        MixtralForCausalLM,
        {**EAGER, "intermediate_size": 30, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 37},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "num_experts": 7},
    ),
    "qwen2_moe_some_dense": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            **EAGER,
            "moe_intermediate_size": 30,
            "shared_expert_intermediate_size": 34,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "moe_intermediate_size": 24,
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "head_dim": 16,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_experts_per_tok": 2,
            "num_local_experts": 5,
            "sliding_window": 29,
            "swiglu_limit": 2.0,
        },
    ),
}
MODELS = DENSE | MIXTURES


def make_model(name: str, path: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write the model `name` to `path` and return transformers' own, in float32. Biases and norms are random too."""
    config_class, model_class, fields = MODELS[name]
    torch.manual_seed(seed)
    return save_randomized(model_class(config_class(**{**SHAPE, **fields, **changes})), path)


def save_randomized(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Write it; its biases and norms, which are all alike at first, are random then."""
    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.3, 1.3)
    model.save_pretrained(path)
    return model


def rewrite_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


@torch.no_grad()
def their_greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers' own model and cache, one prompt at a time, never stopping."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    answers = []
    for prompt in prompts:
        ids, cache, answer = torch.tensor([list(prompt)]), None, []
        for _ in range(num_tokens):
            out = model(input_ids=ids, use_cache=True, **{name: cache})
            cache = out[name]
            answer.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[answer[-1]]])
        answers.append(answer)
    return answers
