"""A guide's trial: it is compiled, and a few answers are written with it, to see what that takes.

Runs in a process of its own (`trial_process.py`), which has limits of time and memory: a compilation by a library
cannot be interrupted otherwise.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, Final, Self

import torch

from tensorweave.cluster.guide import Guide
from tensorweave.workers.guided.compilers import Compilers, SizedGrammar
from tensorweave.workers.guided.limits import MAX_COMPILED_BYTES, MAX_TOKEN_S
from tensorweave.workers.guided.mask_bits import allowed_tokens

_ANSWERS: Final = (256, 64, 64)
"""The most tokens of each random answer. Where a grammar has many ways to read a text, each token takes longer than the
one before."""
_NUM_SLOW: Final = 3
"""So many tokens over the limit are no accident."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """`problem`: why the guide is refused; empty if it is not. `is_late`: the machine may have been too busy."""

    problem: str
    num_bytes: int = 0
    is_late: bool = False

    def to_wire(self) -> list[Any]:
        return [self.problem, self.num_bytes, self.is_late]

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        return cls(*fields)


def try_guide(compilers: Compilers, guide: Guide, vocab_size: int, end_id: int) -> TrialResult:
    try:
        grammar = compilers.compile(guide)
    except ValueError as error:
        return TrialResult(str(error))
    if grammar.num_bytes > MAX_COMPILED_BYTES:
        return TrialResult(f"its compiled form takes {grammar.num_bytes} bytes, over the limit of {MAX_COMPILED_BYTES}")
    return TrialResult(_write_answers(grammar, guide, vocab_size, end_id), grammar.num_bytes)


def _write_answers(grammar: SizedGrammar, guide: Guide, vocab_size: int, end_id: int) -> str:
    """Return what is wrong with the grammar at random answers."""
    draw = random.Random(guide.digest)
    mask_NW = torch.zeros(1, (vocab_size + 31) // 32, dtype=torch.int32)
    num_slow = 0
    for num_tokens in _ANSWERS:
        matcher = grammar.matcher((end_id,))
        for place in range(num_tokens):
            started_s = time.thread_time()
            failures = matcher.filler.fill([matcher], mask_NW)
            filled_s = time.thread_time()
            if failures:
                return failures[0]
            allowed = allowed_tokens(mask_NW[0])
            if not len(allowed):
                return "it leads to a text that cannot be ended" if place else "it allows no text"
            token = int(allowed[draw.randrange(len(allowed))])
            drawn_s = time.thread_time()
            if not matcher.accept([token]):
                return "the library refuses a token that it allows"
            num_slow += filled_s - started_s + time.thread_time() - drawn_s > MAX_TOKEN_S
            if num_slow >= _NUM_SLOW:
                return f"it takes more than {1000 * MAX_TOKEN_S:g} ms to find the tokens that may come next"
            if token == end_id:
                break
    return ""
