"""The architectures of GGUF files that are served: their tensors' names, and what their metadata mean as a config.json.

llama.cpp calls Llama, Mistral and what has their form `llama`, and stores rows of q and k of these in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tensorweave.workers.store.gguf_header import GgufHeader

_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS: Final = "rope_freqs.weight"
"""Of Llama 3: the inverse of the factor of each frequency."""
_DESCRIBED: Final = ("GGUF.", "general.", "quantize.", "tokenizer.")
"""`gguf_vocabulary` checks the tokenizer's."""
_HYPERPARAMETERS: Final = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
)
_WINDOW, _ROTATED = "attention.sliding_window", "rope.dimension_count"
_LLAMA3_SCALINGS: Final = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""Factor, low and high frequency factor, original length: of Llama 3.1 and of Llama 3.2."""
_DEFAULT_THETA: Final = 10_000.0


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """`has_neighbours`: rows of q and k are in the order in which neighbours are rotated together. `has_windows`:
    layers may have a sliding window, and part of each head may be rotated."""

    architecture: str
    model_type: str
    has_neighbours: bool = False
    has_windows: bool = False
    fixed: Mapping[str, Any] | None = None
    layer_names: Mapping[str, str] = field(default_factory=lambda: _LAYER)

    def hf_name(self, name: str) -> str | None:
        """The name of a tensor in a Hugging Face checkpoint; None: the family has no such tensor."""
        if name in _OUTER:
            return _OUTER[name]
        match name.split("."):
            case ["blk", layer, part, "weight" | "bias" as kind] if part in self.layer_names:
                return f"model.layers.{layer}.{self.layer_names[part]}.{kind}"
        return None


FAMILIES: Final[Mapping[str, GgufFamily]] = {
    "llama": GgufFamily(
        "LlamaForCausalLM", "llama", has_neighbours=True, fixed={"attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2"),
    "phi3": GgufFamily("Phi3ForCausalLM", "phi3", has_windows=True, layer_names=_PHI3_LAYER),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3", fixed={"attention_bias": False}),
}


def find_family(header: GgufHeader) -> GgufFamily:
    """Raises ValueError if the architecture is not served."""
    if header.architecture not in FAMILIES:
        raise header.wrong("general.architecture", ", ".join(FAMILIES))
    return FAMILIES[header.architecture]


def hf_config(header: GgufHeader, rope_factors: np.ndarray[Any, Any] | None, dtype: str) -> dict[str, Any]:
    """The content of a config.json. `rope_factors` are those of the tensor `ROPE_FACTORS`.

    Raises:
        ValueError: the file's metadata say what is not computed; names the key.
    """
    family, prefix = find_family(header), f"{header.architecture}."
    own = (_WINDOW,) if family.has_windows else ()
    header.refuse_unread({prefix + key for key in (*_HYPERPARAMETERS, *own)}, _DESCRIBED)
    if header.fields.get("split.count", 1) != 1:
        raise header.wrong("split.count", "1: merge the parts with llama-gguf-split --merge")
    heads, hidden = header.required(prefix + "attention.head_count"), header.required(prefix + "embedding_length")
    head_dim = header.fields.get(prefix + "attention.key_length", hidden // heads)
    for key in ("attention.value_length",) if family.has_windows else ("attention.value_length", _ROTATED):
        if header.fields.get(prefix + key, head_dim) != head_dim:
            raise header.wrong(prefix + key, f"the size of a head ({head_dim})")
    length = header.required(prefix + "context_length")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **(family.fixed or {}),
        **(_windows(header, head_dim) if family.has_windows else {}),
        **special_ids(header),
        "dtype": dtype,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": header.required(prefix + "feed_forward_length"),
        "max_position_embeddings": length,
        "num_attention_heads": heads,
        "num_hidden_layers": header.required(prefix + "block_count"),
        "num_key_value_heads": header.fields.get(prefix + "attention.head_count_kv", heads),
        "rms_norm_eps": shortest(header.required(prefix + "attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(header, rope_factors, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
    }


def _windows(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    prefix = f"{header.architecture}."
    rotated = header.fields.get(prefix + _ROTATED, head_dim)
    return {
        "sliding_window": header.fields.get(prefix + _WINDOW) or None,
        "original_max_position_embeddings": header.required(prefix + "context_length"),
        **({} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}),
    }


def special_ids(header: GgufHeader) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: header.fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def end_ids(header: GgufHeader) -> list[int]:
    """The ends of a sequence, of a turn and of a message, each once."""
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(header.fields[key] for key in keys if key in header.fields))


def shortest(value: float) -> float:
    """The shortest decimal of a number that was stored as float32: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope(header: GgufHeader, factors: np.ndarray[Any, Any] | None, head_dim: int) -> dict[str, Any]:
    prefix = f"{header.architecture}.rope."
    theta = shortest(header.fields.get(prefix + "freq_base", _DEFAULT_THETA))
    kind = header.fields.get(prefix + "scaling.type", "none")
    factor = header.fields.get(prefix + "scaling.factor")
    if header.fields.get(prefix + "scaling.attn_factor", 1.0) != 1.0:
        raise header.wrong(prefix + "scaling.attn_factor", "1.0")
    if factors is not None:
        if kind != "none":
            raise header.wrong(prefix + "scaling.type", f"none beside the tensor {ROPE_FACTORS}")
        return {"rope_theta": theta, **_llama3(header, factors, theta, head_dim)}
    match kind:
        case "none":
            return {"rope_theta": theta, "rope_type": "default"}
        case "linear" if factor:
            return {"rope_theta": theta, "rope_type": "linear", "factor": shortest(factor)}
        case "yarn" if factor:
            original = header.required(prefix + "scaling.original_context_length")
            scaling = {"factor": shortest(factor), "original_max_position_embeddings": original}
            return {"rope_theta": theta, "rope_type": "yarn", **scaling}
    raise header.wrong(prefix + "scaling.type", "none, linear and yarn, the last two with a scaling.factor")


def _llama3(header: GgufHeader, factors: np.ndarray[Any, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling of which `factors` are made: they are stored, it is not."""
    for factor, low, high, original in _LLAMA3_SCALINGS:
        if np.allclose(factors, llama3_factors(theta, head_dim, factor, low, high, original), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"{header.source}: {ROPE_FACTORS} is of none of the scalings that are known: Llama 3.1's and 3.2's"
    )


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray[Any, Any]:
    """What each frequency is divided by: 1 for short waves, `factor` for long ones, a value between for others."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
