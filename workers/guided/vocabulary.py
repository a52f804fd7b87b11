"""`Vocabulary`: a model's tokens in the forms that xgrammar and llguidance read. Made in the process of the trials,
because loading a tokenizer holds the interpreter's lock for long."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

from tensorweave.cluster.errors import WireError


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a tokenizer is: a directory or a hub id, or, of one that exists in memory alone, its JSON and its end of
    sequence."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    is_fast: bool = True
    json: str = ""
    end_id: int | None = None

    @classmethod
    def of(cls, given: Any, model_path: str, revision: str | None, trust_remote_code: bool, is_fast: bool) -> Self:
        """`given` is what the arguments have as tokenizer: nothing, a name, or a tokenizer of transformers."""
        if given is None:
            return cls(model_path, None, trust_remote_code, is_fast)
        rust = getattr(given, "backend_tokenizer", None)
        if rust is not None:
            return cls(model_path, json=rust.to_str(), end_id=given.eos_token_id)
        return cls(str(given), revision, trust_remote_code, is_fast)

    def to_wire(self) -> list[Any]:
        return [self.path, self.revision, self.trust_remote_code, self.is_fast, self.json, self.end_id]

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens, as the trial process has read them.

    Args:
        size: The model's, which may be larger than the tokenizer's.
        end_id: The tokenizer's end of sequence, or its last token.
        special: Special tokens: their ids and texts.
        xgrammar_json: xgrammar's `TokenizerInfo`.
        tokenizer_json: The tokenizers library's form; empty if the tokenizer is of another library.
        tokens_digest: That of `tokenizer_json`.
    """

    size: int
    end_id: int
    special: tuple[tuple[int, str], ...]
    xgrammar_json: str
    tokenizer_json: str
    tokens_digest: bytes

    def to_wire(self) -> list[Any]:
        return [self.size, self.end_id, self.special, self.xgrammar_json, self.tokenizer_json, self.tokens_digest]

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        try:
            size, end_id, special, xgrammar_json, tokenizer_json, digest = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed vocabulary: {error}") from None
        return cls(size, end_id, tuple((token, text) for token, text in special), xgrammar_json, tokenizer_json, digest)


def read_vocabulary(source: TokenizerSource, size: int) -> Vocabulary:
    """Load the tokenizer: seconds. Raises ValueError, OSError."""
    import xgrammar  # here: both take long to import

    tokenizer = _load(source)
    end_id = tokenizer.eos_token_id if source.end_id is None else source.end_id
    if not isinstance(end_id, int) or not 0 <= end_id < size:
        end_id = min(size, len(tokenizer)) - 1  # the libraries want one; requests have stop tokens of their own
    rust = getattr(tokenizer, "backend_tokenizer", None)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size, stop_token_ids=[end_id])
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= {token: tokenizer.convert_ids_to_tokens(token) for token in tokenizer.all_special_ids}
    written = "" if rust is None else rust.to_str()
    return Vocabulary(
        size,
        end_id,
        tuple((token, text) for token, text in sorted(special.items()) if token < size),
        info.serialize_json(),
        written,
        tokens_digest(written),
    )


def tokens_digest(tokenizer_json: str) -> bytes:
    """Of what a tokenizer's JSON says about its tokens: their bytes, and which are special. How texts are split into
    tokens may differ."""
    if not tokenizer_json:
        return b""
    parts = json.loads(tokenizer_json)
    added = [[token["id"], token["content"], token["special"]] for token in parts["added_tokens"]]
    said = json.dumps([parts["model"], added, _kinds_of(parts["decoder"])], sort_keys=True)
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _kinds_of(decoder: Any) -> Any:
    """A decoder without the switches of byte-level ones, which do not change a token's bytes."""
    if isinstance(decoder, dict) and decoder.get("type") == "ByteLevel":
        return "ByteLevel"
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        return [_kinds_of(part) for part in decoder["decoders"]]
    return decoder


def _load(source: TokenizerSource) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.json:
        from tokenizers import Tokenizer

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(source.json))
    return AutoTokenizer.from_pretrained(
        source.path,
        use_fast=source.is_fast,
        revision=source.revision or "main",
        trust_remote_code=source.trust_remote_code,
    )
