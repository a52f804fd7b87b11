"""Writes the tokenizer of a GGUF file as Hugging Face's tokenizer files. What would change token ids is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tensorweave.workers.store.gguf_header import GgufHeader
from tensorweave.workers.store.gguf_vocabulary import SPLITTINGS, GgufVocabulary

_MODEL: Final = "tokenizer.ggml.model"
_BYTE_LEVEL_BPE, _SENTENCEPIECE = "gpt2", "llama"
_READ: Final = frozenset(
    {
        _MODEL,
        "tokenizer.chat_template",
        *(f"tokenizer.ggml.{kind}_token_id" for kind in ("bos", "eos", "eot", "eom", "padding", "unknown")),
        *(f"tokenizer.ggml.{key}" for key in ("add_bos_token", "merges", "pre", "scores", "token_type", "tokens")),
    }
)
_UNUSED: Final = ("tokenizer.chat_template.", "tokenizer.chat_templates", "tokenizer.huggingface.")
_UNUSED_IDS: Final = frozenset(
    f"tokenizer.ggml.{kind}_token_id"
    for kind in ("cls", "mask", "sep", "seperator", "prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid")
) | frozenset(f"tokenizer.ggml.fim_{kind}_token_id" for kind in ("pad", "rep", "sep"))
"""Tokens that prompts may hold; nobody adds them."""


def write_tokenizer(header: GgufHeader, file: Path, target: Path) -> None:
    """Into the directory `target`, of the GGUF file `file`.

    Raises:
        ValueError: the tokenizer is of a kind that is not converted; names the key.
    """
    _check(header)
    if header.fields[_MODEL] == _SENTENCEPIECE:
        _write_sentencepiece(header, file, target)
        return
    vocabulary = GgufVocabulary.of(header.fields)
    (target / "tokenizer.json").write_text(json.dumps(vocabulary.tokenizer(), ensure_ascii=False), encoding="utf-8")
    _write_json(target / "tokenizer_config.json", vocabulary.tokenizer_config())


def _check(header: GgufHeader) -> None:
    known = (_BYTE_LEVEL_BPE, _SENTENCEPIECE)
    if header.fields.get(_MODEL) not in known:
        raise header.wrong(_MODEL, ", ".join(known))
    is_bpe = header.fields[_MODEL] == _BYTE_LEVEL_BPE
    if is_bpe and header.fields.get("tokenizer.ggml.pre") not in SPLITTINGS:
        raise header.wrong("tokenizer.ggml.pre", ", ".join(SPLITTINGS))
    for key in ("tokens", "token_type", "merges" if is_bpe else "scores"):
        header.required(f"tokenizer.ggml.{key}")
    neutral = {
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.add_space_prefix": not is_bpe,
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.ggml.token_type_count": 0,
    }
    for key, value in header.fields.items():
        if not key.startswith("tokenizer.") or key in _READ or key in _UNUSED_IDS or key.startswith(_UNUSED):
            continue
        if key in neutral and value != neutral[key]:
            raise header.wrong(key, str(neutral[key]))
        if key not in neutral:
            raise header.wrong(key, "none: take the key out of the file, or give a tokenizer directory")


def _write_sentencepiece(header: GgufHeader, file: Path, target: Path) -> None:
    """Write it by transformers' own conversion, which adds the first token if the file says so or does not say."""
    from transformers import AutoTokenizer

    if header.fields.get("tokenizer.ggml.add_bos_token", True) is not True:
        raise header.wrong("tokenizer.ggml.add_bos_token", "true, with tokenizer.ggml.model 'llama'")
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(target)
    config = target / "tokenizer_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    _write_json(config, {**fields, "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
