"""Random texts that a guide allows: tokens drawn under xgrammar's own matcher, as a random model would write them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import numpy as np
import xgrammar

from tensorweave.cluster.guide import Guide

_PIECES: Final = (
    *('{"name": "', '": ', '", "', "</parameter>\n", "<parameter=", "}}", "get_weather", "city", "</arg_value>", "), "),
    *("<think>", "</think>", "<tool_call>", "<function=", "</｜DSML｜parameter>\n", "[TOOL_CALLS]", "<|call|>"),
    *("é", "😀", "\\u00e9"),
)


class Sampler:
    """Draws tokens of one vocabulary.

    Args:
        tokens: The bytes of each.
        info: The same for xgrammar.
        end_id: Ends a text.
    """

    def __init__(self, tokens: Sequence[bytes], info: xgrammar.TokenizerInfo, end_id: int) -> None:
        self.tokens = tokens
        self._end_id = end_id
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self._closing = np.array([token[:1] in b'"}])<,\n0' or token in _CLOSING_WORDS for token in tokens])

    def matcher(self, guide: Guide) -> xgrammar.GrammarMatcher:
        assert guide.kind == "structural_tag"
        return xgrammar.GrammarMatcher(self._compiler.compile_structural_tag(guide.text))

    def allowed(self, matcher: xgrammar.GrammarMatcher) -> np.ndarray:
        """Whether each token may come next."""
        mask = xgrammar.allocate_token_bitmask(1, len(self.tokens))
        matcher.fill_next_token_bitmask(mask)
        return np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: len(self.tokens)].astype(bool)

    def draw(self, guide: Guide, rng: random.Random, max_tokens: int = 400) -> str | None:
        """A text that the guide allows; None if it has not ended. Tokens that close something are likelier, or few
        texts would end."""
        matcher, raw = self.matcher(guide), b""
        for _ in range(max_tokens):
            allowed = self.allowed(matcher)
            closing = np.flatnonzero(allowed & self._closing)
            choices = closing if len(closing) and rng.random() < 0.6 else np.flatnonzero(allowed)
            token = int(choices[rng.randrange(len(choices))])
            assert matcher.accept_token(token)
            if token == self._end_id:
                return raw.decode(errors="replace")
            raw += self.tokens[token]
        return None


_CLOSING_WORDS: Final = frozenset(piece.encode() for piece in _PIECES)


def small_vocabulary() -> Sampler:
    """All bytes, and some longer tokens that hold a marker or parts of two elements."""
    tokens = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in _PIECES), b"</s>"]
    end_id = len(tokens) - 1
    return Sampler(tokens, xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, stop_token_ids=[end_id]), end_id)
