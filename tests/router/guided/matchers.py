"""Guides compiled by the libraries that enforce them, and random answers that follow one, without a model.

The vocabulary is one token per byte: any text can be spelled, and masks are small. `tests/workers/guided` has the same
guides over a tokenizer's vocabulary.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import jsonschema
import llguidance
import numpy as np
import xgrammar
from jsonschema.validators import validator_for

from tensorweave.cluster.guide import Guide

END: Final = 256
SIZE: Final = 257
_CLOSERS: Final = frozenset([END, *b'"}],'])


class ByteTokenizer:
    """In the form that llguidance wraps."""

    eos_token_id = END
    bos_token_id = None
    tokens = [*(bytes([i]) for i in range(256)), b"<end>"]
    special_token_ids = [END]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


_INFO: Final = xgrammar.TokenizerInfo(
    ByteTokenizer.tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=SIZE, stop_token_ids=[END]
)
_COMPILER: Final = xgrammar.GrammarCompiler(_INFO, max_threads=1, cache_enabled=False)
_TOKENIZER: Final = llguidance.LLTokenizer(llguidance.TokenizerWrapper(ByteTokenizer()), n_vocab=SIZE)


class Walk(Protocol):
    """One answer in the making."""

    def allowed(self) -> np.ndarray[Any, Any]:
        """Ids of the tokens that may come next."""

    def accept(self, token: int) -> bool: ...

    @property
    def may_end(self) -> bool: ...


class XgrammarWalk:
    def __init__(self, guide: Guide) -> None:
        self._matcher = xgrammar.GrammarMatcher(_compile_xgrammar(guide))
        self._mask = xgrammar.allocate_token_bitmask(1, SIZE)

    def allowed(self) -> np.ndarray[Any, Any]:
        self._matcher.fill_next_token_bitmask(self._mask)
        return _set_bits(self._mask.numpy().view(np.uint8))

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_completed())


class LlguidanceWalk:
    def __init__(self, guide: Guide) -> None:
        self._matcher = _compile_llguidance(guide).deep_copy()

    def allowed(self) -> np.ndarray[Any, Any]:
        allowed = _set_bits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8))
        assert not self._matcher.is_error(), self._matcher.get_error()
        return allowed

    def accept(self, token: int) -> bool:
        return bool(self._matcher.consume_token(token))

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())


def begin(guide: Guide) -> Walk:
    """Raises RuntimeError or ValueError for a guide that does not compile."""
    return XgrammarWalk(guide) if guide.backend == "xgrammar" else LlguidanceWalk(guide)


def accepts(guide: Guide, text: str) -> bool:
    """Whether the whole text follows the guide."""
    walk = begin(guide)
    return all(walk.accept(byte) for byte in text.encode()) and walk.may_end


def answers(guide: Guide, seeds: Sequence[int], *, max_tokens: int = 500) -> Iterator[bytes]:
    """Random answers that came to their end."""
    for seed in seeds:
        walk, draw, answer = begin(guide), random.Random(seed), bytearray()
        for _ in range(max_tokens):
            token = _pick(walk.allowed().tolist(), draw)
            if token == END:
                yield bytes(answer)
                break
            assert walk.accept(token), f"the mask allows {token} after {bytes(answer)!r}, and the matcher does not"
            answer.append(token)


def _pick(allowed: list[int], draw: random.Random) -> int:
    """Uniform choice would go on for ever: it prefers what closes something."""
    assert allowed, "no token is allowed"
    closers = [token for token in allowed if token in _CLOSERS]
    if closers and draw.random() < 0.35:
        return draw.choice(closers)
    plain = [token for token in allowed if token < 128]
    return draw.choice(plain if plain and draw.random() < 0.6 else allowed)


def validator(schema: Any) -> jsonschema.protocols.Validator:
    """That of the draft that the schema names, formats included."""
    cls = validator_for(schema, default=jsonschema.Draft202012Validator)
    return cls(schema, format_checker=cls.FORMAT_CHECKER)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _set_bits(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.flatnonzero(np.unpackbits(mask.reshape(-1), bitorder="little")[:SIZE])


@functools.lru_cache(64)
def _compile_llguidance(guide: Guide) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(_TOKENIZER, _llguidance_grammar(guide), log_level=0)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


@functools.lru_cache(64)
def _compile_xgrammar(guide: Guide) -> xgrammar.CompiledGrammar:
    match guide.kind:
        case "json_schema":
            return _COMPILER.compile_json_schema(
                guide.text,
                any_whitespace=guide.max_whitespace > 0,
                max_whitespace_cnt=guide.max_whitespace or None,
                strict_mode=False,
            )
        case "regex":
            return _COMPILER.compile_regex(guide.text)
        case "ebnf":
            return _COMPILER.compile_grammar(guide.text)
        case "structural_tag":
            return _COMPILER.compile_structural_tag(guide.text)
    raise AssertionError(guide.kind)


def _llguidance_grammar(guide: Guide) -> str:
    match guide.kind:
        case "json_schema":
            options: Any = {"whitespace_pattern": rf"[ \n\r\t]{{1,{guide.max_whitespace}}}"}
            if not guide.max_whitespace:
                options = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
            return llguidance.LLMatcher.grammar_from_json_schema(guide.text, overrides=options)
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(guide.text)
        case "lark":
            return llguidance.LLMatcher.grammar_from_lark(guide.text)
    raise AssertionError(guide.kind)
