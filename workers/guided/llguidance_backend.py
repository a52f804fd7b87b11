"""Grammars by llguidance, for what xgrammar does not enforce. Imported when the first guide for it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import llguidance
from torch import Tensor

from tensorweave.cluster.guide import Guide
from tensorweave.workers.guided.mask_bits import clear_bits, set_bits
from tensorweave.workers.guided.vocabulary import Vocabulary
from tensorweave.workers.guided.watched import WatchedGrammar

# N rows, W words of bits

_SILENT: Final = 0
_GRAMMAR_BYTES: Final = 1 << 20
"""A guess: llguidance does not say how much memory it takes."""


class LlguidanceCompiler:
    """Compiles on the calling thread, without the interpreter's lock. Its matchers have limits of their own, which
    count work and not time, so they fail alike on every rank."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.tokenizer_json:
            raise ValueError("llguidance needs a tokenizer of the tokenizers library, which this model has not")
        self._end_id = vocabulary.end_id
        self._tokenizer = llguidance.LLTokenizer(
            vocabulary.tokenizer_json, n_vocab=vocabulary.size, eos_token=vocabulary.end_id
        )
        self._limits = llguidance.LLParserLimits(
            verbose_errors=False
        )  # an error is for the client: no text of its answer
        self._filler = LlguidanceFiller()

    def compile(self, guide: Guide) -> LlguidanceGrammar:
        """Raises ValueError with what is wrong with the guide."""
        text = _grammar(guide)
        first = llguidance.LLMatcher(self._tokenizer, text, log_level=_SILENT, limits=self._limits)
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
