"""`GgufVocabulary`: a GGUF file's byte-level BPE vocabulary, as Hugging Face's tokenizer files state it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_CONTROL_TOKEN: Final = 3  # llama.cpp's token types: 1 normal, 3 control, 4 user-defined
_USER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """Parallel lists by token id, merges, and special ids."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int
    eos: int
    pad: int
    unknown: int
    chat_template: str
    max_length: int

    @classmethod
    def of(cls, fields: dict[str, Any]) -> GgufVocabulary:
        return cls(
            tokens=fields["tokenizer.ggml.tokens"],
            types=fields["tokenizer.ggml.token_type"],
            merges=fields["tokenizer.ggml.merges"],
            bos=fields["tokenizer.ggml.bos_token_id"],
            eos=fields["tokenizer.ggml.eos_token_id"],
            pad=fields["tokenizer.ggml.padding_token_id"],
            unknown=fields["tokenizer.ggml.unknown_token_id"],
            chat_template=fields["tokenizer.chat_template"],
            max_length=fields["llama.context_length"],
        )

    def added_tokens(self) -> Iterator[dict[str, Any]]:
        for token_id, (content, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (_CONTROL_TOKEN, _USER_TOKEN):
                matching = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
                yield {"id": token_id, "content": content, **matching, "special": kind == _CONTROL_TOKEN}

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json. SmolLM splits digits one by one *before* the byte-level regex.

        Otherwise ids would differ where white space precedes a digit ("\\n\\n1.").
        """
        byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self.added_tokens()),
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, {**byte_level, "add_prefix_space": False}]},
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
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
            "bos_token": self.tokens[self.bos],
            "eos_token": self.tokens[self.eos],
            "pad_token": self.tokens[self.pad],
            "unk_token": self.tokens[self.unknown],
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.max_length,
        }
