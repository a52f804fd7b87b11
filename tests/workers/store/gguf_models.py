"""Tiny GGUF files of each architecture and kind of block, beside transformers' models with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.workers.tiny_models import make_model

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
ROPE = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
VOCAB = [f"<{i}>" for i in range(208)] + ["Ġ", "a", "Ġa"]
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
}
"""Where in a block of the K kinds its float16 are: the package quantizes none of these, so their bits are random."""

Kinds = Callable[[str], str]


def write_gguf_model(
    file: Path,
    kind_of: Kinds,
    *,
    family: str = "llama",
    add: Callable[[gguf.GGUFWriter], Any] = lambda w: None,
    **changes: Any,
) -> PreTrainedModel:
    """`kind_of` gives the kind of a matrix by its name in the file."""
    folder = file.parent / "plain"
    model = make_model(family, folder, **{**SIZES, **ROPE, "rms_norm_eps": 1e-5, **changes})
    config, writer = model.config, gguf.GGUFWriter(file, family.partition("_")[0])
    _write_metadata(writer, config)
    add(writer)
    plain = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored, kind = (
            gguf_name(name),
            gguf.GGMLQuantizationType[kind_of(gguf_name(name)) if tensor.dim() > 1 else "F32"],
        )
        values, heads = tensor.numpy(), _heads(name, config) if family == "llama" else None
        if heads is not None:
            values = permuted(values, heads)
        blocks = _blocks(values, kind, stored)
        back = dequantize(blocks, kind).reshape(values.shape)
        plain[name] = torch.from_numpy(back if heads is None else unpermuted(back, heads))
        writer.add_tensor(stored, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(plain, strict=False)
    model.tie_weights()
    return model


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def permuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order, as its converter makes it: halves of a head become neighbours."""
    shape = values.shape
    return np.ascontiguousarray(values.reshape(heads, 2, -1, *shape[1:]).swapaxes(1, 2)).reshape(shape)


def unpermuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    shape = values.shape
    return np.ascontiguousarray(values.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2)).reshape(shape)


def random_blocks(shape: tuple[int, int], kind: str, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Any bits are a block; its scales are made small numbers."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (shape[0] * shape[1] // size, num_bytes), dtype=np.uint8)
    for place in _HALVES[kind]:
        halves = (random.random(len(blocks)) * 1e-3).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def _blocks(values: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    if kind.name in _HALVES:
        return random_blocks((values.shape[0], values.shape[1]), kind.name, len(name) + sum(map(ord, name)))
    return quantize(values, kind)


def _heads(name: str, config: Any) -> int | None:
    if "q_proj" in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in name else None


def _write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(
        config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads
    )
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(VOCAB)
    writer.add_token_types([3] * 208 + [1, 1, 1])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
