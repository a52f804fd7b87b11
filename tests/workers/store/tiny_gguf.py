"""A small random GGUF file of the Llama family, as llama.cpp would write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 32, 2, 4, 2, 64
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *[chr(c) for c in range(ord("!"), ord("~") + 1)],
    "Ġ",
    "Ċ",
    "12",
]


def write_tiny_gguf(
    path: Path, *, pre_tokenizer: str = "smollm", add: Callable[[gguf.GGUFWriter], None] = lambda writer: None
) -> dict[str, np.ndarray]:
    """A random two-layer llama in GGUF form; returns its float32 tensors in llama.cpp's layout."""
    writer = gguf.GGUFWriter(path, "llama")
    add(writer)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    random = np.random.default_rng(7)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        shapes |= {prefix + "attn_norm": (HIDDEN,), prefix + "ffn_norm": (HIDDEN,)}
        shapes |= {prefix + "attn_q": (HIDDEN, HIDDEN), prefix + "attn_output": (HIDDEN, HIDDEN)}
        shapes |= {prefix + name: (HIDDEN // HEADS * KV_HEADS, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {prefix + name: (FEED_FORWARD, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {prefix + "ffn_down": (HIDDEN, FEED_FORWARD)}
    tensors = {name + ".weight": random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
