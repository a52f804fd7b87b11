"""Grammars by xgrammar, which takes half a second to import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import torch
import xgrammar
from torch import Tensor

from tensorweave.cluster.guide import Guide
from tensorweave.workers.guided.compile_run import Run, run_here
from tensorweave.workers.guided.mask_bits import clear_bits
from tensorweave.workers.guided.vocabulary import Vocabulary
from tensorweave.workers.guided.watched import WatchedGrammar

# N rows, W words of bits

_NOISE: Final = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: \(.*?\) is false: | The JSON string is:.*")
"""What xgrammar's messages have beside their sentence: time and place in its source, the condition, all of the text."""
_MAX_KEPT: Final = 64


class XgrammarCompiler:
    """Compiles without the interpreter's lock."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        info = xgrammar.TokenizerInfo.deserialize_json(vocabulary.xgrammar_json)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._filler = XgrammarFiller()
        self._vocabulary = vocabulary

    def compile(self, guide: Guide, run: Run = run_here) -> XgrammarGrammar:
        """Raises ValueError with what is wrong with the guide."""
        try:
            compiled = run(lambda: self._compile(guide))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(_sentence(error)) from None
        unnamed = [token for token, text in self._vocabulary.special if text not in guide.text]
        return XgrammarGrammar(compiled, self._filler, self._vocabulary, unnamed)

    def _compile(self, guide: Guide) -> xgrammar.CompiledGrammar:
        compiler, text = self._compiler, guide.text
        match guide.kind:
            case "json_schema":
                return compiler.compile_json_schema(
                    text,
                    any_whitespace=guide.max_whitespace > 0,
                    max_whitespace_cnt=guide.max_whitespace or None,
                    strict_mode=False,
                )
            case "regex":
                return compiler.compile_regex(text)
            case "ebnf":
                return compiler.compile_grammar(text)
            case "lark":
                return compiler.compile_lark(text)
            case "structural_tag":
                return compiler.compile_structural_tag(text)


class XgrammarGrammar(WatchedGrammar):
    """`unnamed` are the special tokens that the guide's text does not have: to xgrammar they are tokens like others,
    but an answer's text is without them."""

    def __init__(
        self,
        compiled: xgrammar.CompiledGrammar,
        filler: XgrammarFiller,
        vocabulary: Vocabulary,
        unnamed: Sequence[int],
    ) -> None:
        super().__init__()
        self._compiled = compiled
        self._filler = filler
        self._vocabulary = vocabulary
        self._unnamed = unnamed
        self._kept: dict[tuple[int, ...], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return int(self._compiled.memory_size_bytes)

    def matcher(self, stop_token_ids: Sequence[int]) -> XgrammarMatcher:
        stops = tuple(token for token in stop_token_ids if token < self._vocabulary.size)
        own = stops or (self._vocabulary.end_id,)  # xgrammar wants one; a request without any never gets it
        matcher = xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=list(own))
        return XgrammarMatcher(matcher, self._filler, frozenset(own), self._kept_bits(stops))

    def _kept_bits(self, stops: tuple[int, ...]) -> Tensor:
        """[W] int32: all tokens but those that must never come. Equal for equal stop tokens."""
        kept_W = self._kept.get(stops)
        if kept_W is None:
            size, end_id = self._vocabulary.size, self._vocabulary.end_id
            kept_W = torch.full(((size + 31) // 32,), -1, dtype=torch.int32)
            clear_bits(kept_W, range(size, 32 * len(kept_W)))
            clear_bits(kept_W, {end_id, *self._unnamed} - set(stops))
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[stops] = kept_W
        return kept_W


class XgrammarMatcher:
    """`kept_W`: the bits of tokens that may come where the grammar allows them. `has_ended`: a stop token came."""

    __slots__ = ("_accept", "_stops", "filler", "has_ended", "kept_W", "matcher")

    def __init__(
        self, matcher: xgrammar.GrammarMatcher, filler: XgrammarFiller, stops: frozenset[int], kept_W: Tensor
    ) -> None:
        self.matcher = matcher
        self.filler = filler
        self.kept_W = kept_W
        self.has_ended = False
        self._stops = stops
        self._accept = matcher.accept_token

    def accept(self, tokens: Sequence[int]) -> bool:
        for token in tokens:
            if self.has_ended or not self._accept(token):
                return False
            self.has_ended = token in self._stops
        return True

    def roll_back(self, num_tokens: int) -> None:
        self.matcher.rollback(num_tokens)
        self.has_ended = False


class XgrammarFiller:
    """One thread: 64 rows of 49,152 tokens within a JSON string take 0.6 ms, and two threads 0.5 ms (EPYC)."""

    def __init__(self) -> None:
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=1)

    def fill(self, matchers: Sequence[Any], masks_NW: Tensor) -> dict[int, str]:
        rows = [row for row, each in enumerate(matchers) if not each.has_ended]
        if len(rows) < len(matchers):
            masks_NW.zero_()  # xgrammar fills no row of a matcher that has ended
            self._batch.batch_fill_next_token_bitmask([matchers[row].matcher for row in rows], masks_NW, rows)
        else:  # without a list of rows it takes a fifth less time
            self._batch.batch_fill_next_token_bitmask([each.matcher for each in matchers], masks_NW)
        kept_W = matchers[0].kept_W
        if all(each.kept_W is kept_W for each in matchers):
            masks_NW &= kept_W
        else:
            for row, each in enumerate(matchers):
                masks_NW[row] &= each.kept_W
        return {}


def _sentence(error: Exception) -> str:
    message = _NOISE.sub("", str(error)).strip()
    return message[:500] or type(error).__name__
