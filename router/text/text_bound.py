"""The longest text that can fit a context: a cheap check before a text is tokenized."""

from __future__ import annotations

import json
from typing import Any, Final

import tokenizers

# Normalizers that never shorten a text, and those that compose characters: NFC and NFKC replace at most four code
# points by one (Unicode's stability bound on the length of a decomposition).
_LENGTH_KEEPING: Final = frozenset({"Prepend", "NFD", "NFKD", "Lowercase", "ByteLevel"})
_COMPOSING: Final = frozenset({"NFC", "NFKC"})
_COMPOSED_CHARS: Final = 4


def max_chars_per_token(rust: tokenizers.Tokenizer) -> int | None:
    """The most characters of a text that one token can represent; None if there is no bound.

    A byte-pair vocabulary without an unknown token has a bound: the length of its longest entry. Other models may
    encode a whole word, or any run of unknown characters, as one token.
    """
    parts: dict[str, Any] = json.loads(rust.to_str())
    model = parts["model"]
    is_byte_level = "ByteLevel" in [part["type"] for part in _parts_of(parts["pre_tokenizer"], "pretokenizers")]
    if model["type"] != "BPE" or not (is_byte_level or model["byte_fallback"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]):
        return None  # such a token includes any amount of adjacent white space
    shrinking = 1
    for normalizer in _parts_of(parts["normalizer"], "normalizers"):
        if normalizer["type"] in _COMPOSING:
            shrinking *= _COMPOSED_CHARS
        elif not _keeps_length(normalizer):
            return None
    return shrinking * max(map(len, rust.get_vocab(with_added_tokens=True)), default=1)


def _parts_of(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[name] for step in _parts_of(inner, name)]


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(pattern) <= len(normalizer["content"])
    return normalizer["type"] in _LENGTH_KEEPING
