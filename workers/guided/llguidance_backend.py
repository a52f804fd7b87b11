"""Grammars by llguidance, for what xgrammar does not enforce."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llguidance
import tokenizers
from torch import Tensor

from tensorweave.cluster.guide import Guide
from tensorweave.workers.guided.compile_run import Run, run_here
from tensorweave.workers.guided.mask_bits import clear_bits, set_bits
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary, tokens_digest
from tensorweave.workers.guided.watched import WatchedGrammar

# N rows, W words of bits

_SILENT: Final = 0
_GRAMMAR_BYTES: Final = 1 << 20
"""A guess: llguidance does not say how much memory it takes."""


@dataclass(frozen=True, slots=True)
class ReadyTokenizer:
    """llguidance's form of a tokenizer, made before the first guide comes: that takes 0.2 s for 49,152 tokens and 1 s
    for 151,936, and keeps the interpreter's lock, so that steps would wait."""

    tokenizer: Any
    size: int
    end_id: int
    tokens_digest: bytes

    def is_of(self, vocabulary: Vocabulary) -> bool:
        is_alike = (self.size, self.end_id) == (vocabulary.size, vocabulary.end_id)
        return is_alike and self.tokens_digest == vocabulary.tokens_digest

    @classmethod
    def read(cls, source: TokenizerSource, size: int) -> ReadyTokenizer | None:
        """From the tokenizers library's own file, if there is one. Whether these are the tokens that transformers reads
        shows when it has read them."""
        read = _read_file(source)
        if read is None:
            return None
        written, end_id = read
        if not isinstance(end_id, int) or not 0 <= end_id < size:
            return None
        made = llguidance.LLTokenizer(written, n_vocab=size, eos_token=end_id)
        return cls(made, size, end_id, tokens_digest(written))


def _read_file(source: TokenizerSource) -> tuple[str, Any] | None:
    """A tokenizer's JSON and its end of sequence."""
    if source.json:
        return source.json, source.end_id
    path, config = Path(source.path, "tokenizer.json"), Path(source.path, "tokenizer_config.json")
    if not (source.is_fast and path.is_file() and config.is_file()):
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        end = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except Exception:  # whatever the library raises: the request for the first guide hears of it
        return None
    end = end.get("content") if isinstance(end, dict) else end
    return tokenizer.to_str(), tokenizer.token_to_id(end) if isinstance(end, str) else None


class LlguidanceCompiler:
    """Compiles without the interpreter's lock. Its matchers have limits of their own, which
    count work and not time, so they fail alike on every rank."""

    def __init__(self, vocabulary: Vocabulary, ready: ReadyTokenizer | None = None) -> None:
        if not vocabulary.tokenizer_json:
            raise ValueError("llguidance needs a tokenizer of the tokenizers library, which this model has not")
        self._end_id = vocabulary.end_id
        self._tokenizer = (
            ready.tokenizer
            if ready is not None and ready.is_of(vocabulary)
            else llguidance.LLTokenizer(vocabulary.tokenizer_json, n_vocab=vocabulary.size, eos_token=vocabulary.end_id)
        )
        self._limits = llguidance.LLParserLimits(
            verbose_errors=False
        )  # an error is for the client: no text of its answer
        self._filler = LlguidanceFiller()

    def compile(self, guide: Guide, run: Run = run_here) -> LlguidanceGrammar:
        """Raises ValueError with what is wrong with the guide."""
        text = _grammar(guide)
        first = run(lambda: llguidance.LLMatcher(self._tokenizer, text, log_level=_SILENT, limits=self._limits))
        if first.is_error():
            raise ValueError(_sentence(first))
        return LlguidanceGrammar(first, self._filler, self._end_id)


class LlguidanceGrammar(WatchedGrammar):
    num_bytes = _GRAMMAR_BYTES

    def __init__(self, first: llguidance.LLMatcher, filler: LlguidanceFiller, end_id: int) -> None:
        super().__init__()
        self._first = first
        self._filler = filler
        self._end_id = end_id

    def matcher(self, stop_token_ids: Sequence[int]) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._first.deep_copy(), self._filler, tuple(stop_token_ids), self._end_id)


class LlguidanceMatcher:
    """`stops` are the request's stop tokens, of which llguidance itself knows `end_id` at most."""

    __slots__ = ("end_id", "filler", "has_ended", "matcher", "stops")

    def __init__(
        self, matcher: llguidance.LLMatcher, filler: LlguidanceFiller, stops: tuple[int, ...], end_id: int
    ) -> None:
        self.matcher = matcher
        self.filler = filler
        self.stops = stops
        self.end_id = end_id
        self.has_ended = False

    def accept(self, tokens: Sequence[int]) -> bool:
        for token in tokens:
            if self.has_ended:
                return False
            if token in self.stops:
                self.has_ended = self.matcher.is_accepting()
                if not self.has_ended:
                    return False
            elif self.matcher.is_stopped() or not self.matcher.consume_token(token):
                return False
        return True

    def roll_back(self, num_tokens: int) -> None:
        if self.has_ended:
            self.has_ended = False
            num_tokens -= 1
        if num_tokens:
            self.matcher.rollback(num_tokens)


class LlguidanceFiller:
    """On the calling thread: its threads would be others than the model's, on the same cores."""

    def fill(self, matchers: Sequence[Any], masks_NW: Tensor) -> dict[int, str]:
        failures: dict[int, str] = {}
        num_bytes = masks_NW.shape[1] * masks_NW.element_size()
        for row, each in enumerate(matchers):
            mask_W = masks_NW[row]
            if each.has_ended:
                mask_W.zero_()
                continue
            matcher = each.matcher
            matcher.unsafe_compute_mask_ptr(mask_W.data_ptr(), num_bytes)
            if matcher.is_error():
                failures[row] = _sentence(matcher)
                continue
            clear_bits(mask_W, (each.end_id, *each.stops))
            if matcher.is_accepting():
                set_bits(mask_W, each.stops)
        return failures


def _grammar(guide: Guide) -> str:
    matcher, text = llguidance.LLMatcher, guide.text
    match guide.kind:
        case "json_schema":
            grammar: str = matcher.grammar_from_json_schema(text, overrides=_whitespace(guide.max_whitespace))
        case "regex":
            grammar = matcher.grammar_from_regex(text)
        case "lark":
            grammar = matcher.grammar_from_lark(text)
        case _:
            raise ValueError(f"llguidance does not read guides of kind {guide.kind}")
    return grammar


def _whitespace(most: int) -> Any:
    if not most:
        return {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    return {"whitespace_pattern": rf"[ \n\r\t]{{1,{most}}}"}


def _sentence(matcher: llguidance.LLMatcher) -> str:
    message = matcher.get_error().removesuffix("<non-verbose/>")
    return " ".join(message.split())[:500] or "llguidance gives no reason"
