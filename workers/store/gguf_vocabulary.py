"""`GgufVocabulary`: a GGUF file's byte-level BPE vocabulary, as Hugging Face's tokenizer files state it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_CONTROL_TOKEN: Final = 3  # llama.cpp's token types: 1 normal, 3 control, 4 user-defined
_USER_TOKEN: Final = 4
_BYTE_LEVEL: Final = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}


@dataclass(frozen=True, slots=True)
class Splitting:
    """How text is cut before merges apply. `pattern` is a regular expression of the pieces; None: GPT-2's own, after
    `before`. `takes_whole`: a piece that is a token is not put together from merges. `has_bos`: where the file does not
    say whether the first token is added."""

    pattern: str | None = None
    before: tuple[Mapping[str, Any], ...] = ()
    normalizer: Mapping[str, Any] | None = None
    takes_whole: bool = False
    has_bos: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        if self.pattern is None:
            last = {**_BYTE_LEVEL, "add_prefix_space": False}
            return {"type": "Sequence", "pretokenizers": [*self.before, last]} if self.before else last
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [split, byte_level]}


_ENGLISH: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = Splitting(
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", takes_whole=True, has_bos=True
)
_QWEN2: Final = Splitting(rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", normalizer={"type": "NFC"})
SPLITTINGS: Final[Mapping[str, Splitting]] = {
    "gpt-2": Splitting(),
    # SmolLM cuts digits off one by one before: ids would differ where white space precedes a digit ("\n\n1.").
    "smollm": Splitting(before=({"type": "Digits", "individual_digits": True},)),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": Splitting(_LLAMA3.pattern),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""By llama.cpp's names (`tokenizer.ggml.pre`)."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """Parallel lists by token id, merges, and special ids; None: the vocabulary has no such token."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    pad: int | None
    unknown: int | None
    chat_template: str | None
    max_length: int
    splitting: Splitting
    adds_bos: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> GgufVocabulary:
        """The vocabulary of a file whose `tokenizer.ggml.pre` is one of `SPLITTINGS`."""
        splitting = SPLITTINGS[fields["tokenizer.ggml.pre"]]
        return cls(
            tokens=fields["tokenizer.ggml.tokens"],
            types=fields["tokenizer.ggml.token_type"],
            merges=fields["tokenizer.ggml.merges"],
            bos=fields.get("tokenizer.ggml.bos_token_id"),
            eos=fields.get("tokenizer.ggml.eos_token_id"),
            pad=fields.get("tokenizer.ggml.padding_token_id"),
            unknown=fields.get("tokenizer.ggml.unknown_token_id"),
            chat_template=fields.get("tokenizer.chat_template"),
            max_length=fields[f"{fields['general.architecture']}.context_length"],
            splitting=splitting,
            adds_bos=fields.get("tokenizer.ggml.add_bos_token", splitting.has_bos),
        )

    def added_tokens(self) -> Iterator[dict[str, Any]]:
        for token_id, (content, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (_CONTROL_TOKEN, _USER_TOKEN):
                matching = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
                yield {"id": token_id, "content": content, **matching, "special": kind == _CONTROL_TOKEN}

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self.added_tokens()),
            "normalizer": self.splitting.normalizer,
            "pre_tokenizer": self.splitting.pre_tokenizer(),
            "post_processor": self._post_processor(),
            "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.splitting.takes_whole,
                "vocab": {token: token_id for token_id, token in enumerate(self.tokens)},
                "merges": [merge.split(" ") for merge in self.merges],
            },
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in self.added_tokens()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "bos_token": self._token(self.bos),
            "eos_token": self._token(self.eos),
            "pad_token": self._token(self.pad),
            "unk_token": self._token(self.unknown),
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.max_length,
        }

    def _token(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]

    def _post_processor(self) -> dict[str, Any] | None:
        """What puts the first token before a text."""
        bos = self._token(self.bos)
        if not self.adds_bos or bos is None:
            return None
        first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}]
        text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        return {
            "type": "TemplateProcessing",
            "single": [*first, text],
            "pair": [*first, text, *first, second],
            "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}},
        }
