"""Tokenizers of GGUF files: the same ids as the Hugging Face tokenizer that they were made from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tensorweave.workers.store.gguf_header import GgufHeader
from tensorweave.workers.store.gguf_tokenizer import write_tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "hello world, don't worry: 12345 birds and 67 bees\n\n1. one\n2. two",
    "Schöne Grüße! 日本語 12 I'M",
    "x = [1, 2]\t# y",
]
TEXTS = [*CORPUS, "\n\n 1. 2024  spaces", "<|end|>a <tool>b", "WE'LL e\u0301\u00e9", "🤖🤖 a1b22c333"]


def byte_level(pattern: str, *, digits: str, normalizer: Any = None, bos: str | None = None) -> Tokenizer:
    """As Llama 3 and Qwen state theirs, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bos is not None))
    split = pre_tokenizers.Split(Regex(pattern.replace(r"\p{N}{1,3}", digits)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return tokenizer


def as_gguf(
    tokenizer: Tokenizer, file: Path, pre: str, add: Callable[[gguf.GGUFWriter], Any] = lambda w: None
) -> GgufHeader:
    state = json.loads(tokenizer.to_str())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    vocab = state["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if name.startswith("<|") else 1 for name in sorted(vocab, key=vocab.__getitem__)])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufHeader.read(file)


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    letters = [chr(c) for c in (9, 10, 13, 32, *range(33, 127), *range(0xC0, 0x250), *range(0x3041, 0x3060))]
    return ["".join(rng.choice(letters) for _ in range(40)) for _ in range(count)]


@pytest.mark.parametrize(
    ("pre", "theirs"),
    [
        ("llama-bpe", byte_level(_LLAMA3, digits=r"\p{N}{1,3}", bos="<|begin|>")),
        ("qwen2", byte_level(_LLAMA3, digits=r"\p{N}", normalizer=normalizers.NFC())),
    ],
)
def test_byte_level_ids(pre: str, theirs: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(as_gguf(theirs, tmp_path / "t.gguf", pre), tmp_path / "t.gguf", tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, *random_texts(200)):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == theirs.decode(
            theirs.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
    assert (ours.bos_token, ours.eos_token) == ("<|begin|>", "<|end|>")


def test_the_file_says_whether_the_first_token_is_added(tmp_path: Path) -> None:
    theirs = byte_level(_LLAMA3, digits=r"\p{N}", bos="<|begin|>")
    header = as_gguf(theirs, tmp_path / "t.gguf", "llama-bpe", lambda writer: writer.add_add_bos_token(False))
    write_tokenizer(header, tmp_path / "t.gguf", tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("hello") == theirs.encode("hello").ids[1:]


def test_sentencepiece_by_transformers(tmp_path: Path) -> None:
    """A vocabulary with scores and bytes, as Llama 2's: the first token is added, spaces are part of words."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "h",
        "e",
        "l",
        "o",
        "he",
        "ll",
        "hell",
        "▁hell",
        "▁hello",
    ]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(len(pieces) - i) for i in range(len(pieces) - 259)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_tokenizer(GgufHeader.read(tmp_path / "t.gguf"), tmp_path / "t.gguf", tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(ours, PreTrainedTokenizerFast)
    assert ours.convert_ids_to_tokens(ours.encode("hello hell")) == ["<s>", "▁hello", "▁hell"]
    assert ours.convert_ids_to_tokens(ours.encode("é")) == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert ours.decode(ours.encode("hello hell é"), skip_special_tokens=True) == "hello hell é"


@pytest.mark.parametrize(
    ("pre", "add", "message"),
    [
        ("viking", lambda w: None, r"tokenizer\.ggml\.pre is 'viking'; supported: gpt-2, smollm"),
        (
            "qwen2",
            lambda w: w.add_add_space_prefix(True),
            r"tokenizer\.ggml\.add_space_prefix is 'True'; supported: False",
        ),
        (
            "qwen2",
            lambda w: w.add_uint32("tokenizer.ggml.new_rule", 3),
            r"tokenizer\.ggml\.new_rule is '3'; supported: none",
        ),
    ],
)
def test_what_is_not_converted_is_refused(
    pre: str, add: Callable[[gguf.GGUFWriter], Any], message: str, tmp_path: Path
) -> None:
    header = as_gguf(byte_level(_LLAMA3, digits=r"\p{N}"), tmp_path / "t.gguf", pre, add)
    with pytest.raises(ValueError, match=message):
        write_tokenizer(header, tmp_path / "t.gguf", tmp_path)
