"""The vocabulary of a small byte-level tokenizer, and what its grammars allow."""

from __future__ import annotations

import functools
import random

import torch

from tensorweave.cluster.guide import Guide
from tensorweave.workers.guided.compilers import Compilers
from tensorweave.workers.guided.mask_bits import allowed_tokens
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary, read_vocabulary
from tensorweave.workers.step.grammar import Grammar, Matcher
from tests.router.small_tokenizers import byte_level

SIZE = 420
"""Of the model's vocabulary: a few more than the tokenizer's."""


@functools.cache
def vocabulary() -> Vocabulary:
    rust = byte_level().backend.backend_tokenizer
    return read_vocabulary(TokenizerSource("", json=rust.to_str(), end_id=end_id()), SIZE)


def end_id() -> int:
    end = byte_level().eos_id
    assert end is not None
    return end


@functools.cache
def compilers() -> Compilers:
    return Compilers(vocabulary())


def compile_guide(guide: Guide) -> Grammar:
    return compilers().compile(guide)


def tokens_of(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False)


def text_of(tokens: list[int]) -> str:
    return byte_level().decode(tokens, skip_special_tokens=True)


def allowed(matcher: Matcher) -> set[int]:
    mask = torch.empty(1, (SIZE + 31) // 32, dtype=torch.int32)
    assert matcher.filler.fill([matcher], mask) == {}
    return set(allowed_tokens(mask[0]).tolist())


def write_answer(grammar: Grammar, seed: int, max_tokens: int = 400) -> list[int] | None:
    """A random answer up to its stop token; None if it is not complete by then."""
    draw, matcher, answer = random.Random(seed), grammar.matcher((end_id(),)), list[int]()
    while len(answer) < max_tokens:
        token = draw.choice(sorted(allowed(matcher)))
        assert matcher.accept([token])
        if token == end_id():
            return answer
        answer.append(token)
    return None
