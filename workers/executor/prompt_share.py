"""How many prompt tokens a step computes beside decodes: a `PromptShare`, asked by `MicroBatchScheduler` in each such
step.

A prompt token delays all decodes of its step, and a prompt that waits delays its own request. Few tokens a step share
the reading of the weights with the decodes; many compute the prompts sooner. `BalancedShare` weighs that by what runs
and what waits, `FixedShare` is one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final, NamedTuple, Protocol

from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.step.tiles import (
    MOST_CAPTURED_ROWS,
    TILE,
    prompt_tokens_beside,
    prompt_tokens_to_fill,
    rows_of_decodes,
)

# A request and the token at which its next chunk begins.
PendingContext = tuple[LlmRequest, int]


class PromptLoad(NamedTuple):
    """What a step could compute. `waiting` are the requests beside `pending`, and `has_room` says whether the KV cache
    has room for all of them."""

    decodes: Sequence[LlmRequest]
    pending: Sequence[PendingContext]
    waiting: Sequence[LlmRequest] = ()
    has_room: bool = True


class PromptShare(Protocol):
    """The same on every rank: a function of the requests, the KV cache and the agreed time."""

    def most_tokens(self, load: PromptLoad) -> int:
        """Most prompt tokens of the step. `load` has a decode and a pending context at least."""


class FixedShare:
    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def most_tokens(self, load: PromptLoad) -> int:
        return self._num_tokens


_WIDE: Final = 2 * TILE
"""Rows up to which a step takes hardly longer than the reading of the weights (8B model, H100)."""
_MANY: Final = 4096
"""Rows of a step for many prompts."""
_SMALL_LAYER: Final = 64 * 2**20
"""Weights of a layer below which a GPU computes 4,096 rows sooner than a host launches the kernels of a layer (0.5 to
0.9 ms; an H100 takes 2.3 ms for a layer of an 8B model, 0.2 ms for one of Qwen3-0.6B)."""
_FEW_DECODES: Final = 32
_WORTH_A_TILE: Final = 1.5
"""Decodes beyond `_WIDE` are worth their tiles from this multiple of it on."""
_LEAST_PACED: Final = 384
_ROOM: Final = 0.97
"""Share of the KV cache that is counted on: blocks are not full, and starts are not even."""
_PATIENCE: Final = 0.8
_EAGERNESS: Final = 0.7


class BalancedShare:
    """As many prompt tokens as what waits and what runs suggest, so that they fill a whole step with the decodes:

    - A step of 4,096 rows where as many requests wait as decode: most of them gain. Larger steps are hardly faster and
      delay the first of the prompts; smaller ones are slower.
    - `most` where a prompt has waited 0.8 times as long as the decoding requests have been here on average. So no
      prompt waits for long, and those that came with the decoding ones are not held back for these.
    - Else about 0.7 times the geometric mean of the prompt tokens that wait and the decodes, and at least what fills a
      step of 256 rows, or of 512 beside more than 32 decodes, which cost little beside the reading of the weights.
    - Where some requests have no room in the KV cache, as many as let the starts of requests be spread over the time
      that one takes (`_pace`): those that start together need their most blocks together, too. If that is more than
      `most`, 4,096: prompts of 2,048 tokens are faster whole than cut to whole steps.

    Where the layers are so small that a host launches their kernels more slowly than a GPU computes them, no step has
    more rows than the largest that is captured in a graph.

    Args:
        kv_cache: tells the agreed time, and how many tokens there is room for.
        most: rows of a step with decodes.
        layer_weights: weights of a layer on one rank; the same number on every rank.
    """

    def __init__(self, kv_cache: KVCache, most: int, layer_weights: int) -> None:
        self._kv_cache = kv_cache
        self._captures_all = layer_weights < _SMALL_LAYER
        self._many = MOST_CAPTURED_ROWS if self._captures_all else _MANY
        self._most = min(most, self._many)

    def most_tokens(self, load: PromptLoad) -> int:
        num_decodes = len(load.decodes)
        if not load.has_room:
            return self._pace(load)
        if len(load.pending) + len(load.waiting) >= num_decodes:
            return max(prompt_tokens_to_fill(self._many, num_decodes), 1)
        now_s = self._kv_cache.now_s
        waited_s = now_s - min([request.arrival_s for request, _ in load.pending])
        if waited_s >= _PATIENCE * (now_s - fmean([request.arrival_s for request in load.decodes])):
            return self._whole(num_decodes, self._most)
        num_waiting = sum([request.context_len - start for request, start in load.pending])
        num_waiting += sum([request.context_len for request in load.waiting])
        least = (4 if num_decodes > _FEW_DECODES else 2) * TILE - rows_of_decodes(num_decodes)
        return self._whole(num_decodes, max(least, _EAGERNESS * math.sqrt(num_waiting * num_decodes)))

    def _whole(self, num_decodes: int, num_tokens: float) -> int:
        """The number next to `num_tokens` of those that fill a whole step, but within `most` rows."""
        most = max(self._most - num_decodes, 1)
        fitting = [each for each in prompt_tokens_beside(num_decodes) if each <= most]
        return min(fitting, key=lambda each: abs(each - num_tokens), default=most)

    def _pace(self, load: PromptLoad) -> int:
        """Tokens a step that let requests begin at the rate at which they will end.

        Requests of c prompt and o output tokens hold c + o / 2 on average if their starts are spread over the o steps
        that one takes, and c + o at once if they start together. All run in as few waves as that allows; a wave of n
        begins within s steps, where n (c + o - s / 2) tokens fit. Outputs may become shorter than `max_tokens`, and
        then this is too slow: so it is never less than a few tiles a step.
        """
        prompt = fmean([request.context_len for request in load.waiting])
        output = fmean([request.max_len - request.context_len for request in load.waiting])
        num_tokens = _ROOM * self._kv_cache.num_blocks * self._kv_cache.tokens_per_block
        fitting = num_tokens / (prompt + output / 2)
        num_decodes = len(load.decodes)
        if _WIDE < fitting < _WORTH_A_TILE * _WIDE:
            if num_decodes >= _WIDE:
                return 0
            fitting = _WIDE
        num_requests = num_decodes + len(load.pending) + len(load.waiting)
        num_each = num_requests / math.ceil(num_requests / fitting)
        num_steps = min(output, 2 * (prompt + output - num_tokens / num_each))
        rate = num_each / num_steps if num_steps > 0 else fitting / output
        wanted = max(_LEAST_PACED, prompt * rate)
        return self._whole(num_decodes, wanted) if wanted <= self._most or self._captures_all else _MANY
