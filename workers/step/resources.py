"""What requests hold while they run: `BaseResourceManager`, the `ResourceManager` that holds them all, and what a KV
cache must answer.

The executor calls the hooks once a step on every rank, in the same order with the same batch; schedulers only ask.
Everything here is plain Python and must be deterministic: no clocks (`now_s` is agreed by the ranks and set once a
step), no order of a set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest


class BaseResourceManager:
    """One kind of resource that requests hold. As it stands it is unlimited and counts nothing; override what applies.

    Hooks, in the order of a step: `free_resources` (requests that the schedule paused, and may come again),
    `prepare_resources` (before the step is launched), `update_resources` (once it has settled: tokens are appended,
    `num_computed` has moved on), `truncate`, `free_resources` (requests that ended; also called between steps for a
    cancelled request, and for one that never held anything). The next step may be launched before a step has settled.
    """

    def get_max_resource_count(self) -> int:
        """Units in all, held or not."""
        return sys.maxsize

    def get_needed_resource_to_completion(self, request: LlmRequest) -> int:
        """Most units that the request will ever hold at once, what it holds now included."""
        return 0

    def prepare_resources(self, batch: ScheduledBatch) -> None:
        """Take what this step's batch needs."""

    def update_resources(self, batch: ScheduledBatch) -> None:
        """Note what this step has computed. Requests that ended before it settled have not moved on."""

    def store_computed(self, request: LlmRequest) -> None:
        """Note that KV of the request's first `num_computed` tokens is there now, computed elsewhere."""

    def truncate(self, request: LlmRequest, num_tokens: int) -> None:
        """Give back what the request holds for more than its first `num_tokens` tokens; no launched step uses it."""

    def free_resources(self, request: LlmRequest) -> None:
        """Give back all that the request holds. No launched step uses it any more."""

    def discard_resources(self, request: LlmRequest) -> Sequence[int]:
        """The same where what the request computed may be NaN: nothing of it may be used again. Return the KV blocks
        that nobody uses now, for the engine to wipe."""
        self.free_resources(request)
        return ()

    def shutdown(self) -> None:
        """The step loop has ended."""


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Before the forward, the engine copies the KV of the first `num_tokens` tokens of block `source` to `target`."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Quote:
    """What starting a waiting request would take: its context begins at token `start` (all before is cached), at
    `num_blocks` blocks.

    `pins` is the budget's own note of which cached blocks that counts on. `num_kept` of these are used by one request
    now: they do not come back when that one ends.
    """

    start: int
    num_blocks: int
    pins: tuple[object, ...] = ()
    num_kept: int = 0


class BlockBudget(Protocol):
    """Scratch account of the blocks that one step's plan may give out; asking it changes nothing in the cache.

    Token counts are tokens whose KV the request holds, prompt included.
    """

    num_left: int

    def missing(self, request: LlmRequest, num_tokens: int) -> int:
        """Blocks that a started request lacks to hold `num_tokens`."""

    def freed(self, requests: Sequence[LlmRequest]) -> Sequence[int]:
        """For each of these started requests, the blocks that it holds and no other uses: so many come back for certain
        when it ends. What it takes from now on comes back too."""

    def reserve(self, num_blocks: int) -> None:
        """Count `num_blocks` as given out."""

    def quote(self, request: LlmRequest, num_tokens: int) -> Quote:
        """What a waiting request takes to hold `num_tokens`, given what is cached and what the plan counts on."""

    def take(self, quote: Quote) -> None:
        """Count a quote as given out; the caller has seen that it fits."""

    def release(self, request: LlmRequest) -> None:
        """Count what a started request holds as given back: the plan pauses it."""


@runtime_checkable
class KVCache(Protocol):
    """What executor, engine and schedulers ask of a KV cache manager, beside the hooks of `BaseResourceManager`."""

    num_blocks: int
    tokens_per_block: int
    now_s: float

    @property
    def available(self) -> int:
        """Blocks that can be taken now: free, or cached and used by nobody."""

    @property
    def max_request_tokens(self) -> int:
        """Most tokens, prompt and output, of a request that fits when it is alone."""

    def budget(self) -> BlockBudget:
        """An account of the blocks available now, for planning one step."""

    def block_ids(self, request: LlmRequest) -> list[int]:
        """The request's block table, in token order. Read only.

        It grows at its end in place. Where a block in it was exchanged or taken away, it is another list object than
        before; so whoever keeps a copy of it sees by identity and length what has changed.
        """

    def take_copies(self) -> list[BlockCopy]:
        """Copies to make before this step's forward, in order; each is handed out once."""

    def take_events(self) -> list[dict[str, Any]]:
        """KV events since the last call."""

    def stats(self) -> dict[str, float]:
        """The `kvCacheStats` of get_stats."""

    def audit(self) -> list[str]:
        """Everything wrong with the books, in words; empty when they are right."""


class ResourceManager(BaseResourceManager):
    """Calls its managers in order. The last is the KV cache: the others see a request before its blocks come and go."""

    def __init__(self, managers: Sequence[BaseResourceManager]) -> None:
        if not managers or not isinstance(managers[-1], KVCache):
            last = type(managers[-1]).__name__ if managers else "nothing"
            raise ValueError(
                f"the last resource manager must be a KV cache manager (workers.step.resources.KVCache), not {last}"
            )
        self.managers = tuple(managers)
        self.kv_cache: KVCache = managers[-1]

    def prepare_resources(self, batch: ScheduledBatch) -> None:
        for manager in self.managers:
            manager.prepare_resources(batch)

    def update_resources(self, batch: ScheduledBatch) -> None:
        for manager in self.managers:
            manager.update_resources(batch)

    def store_computed(self, request: LlmRequest) -> None:
        for manager in self.managers:
            manager.store_computed(request)

    def truncate(self, request: LlmRequest, num_tokens: int) -> None:
        for manager in self.managers:
            manager.truncate(request, num_tokens)

    def free_resources(self, request: LlmRequest) -> None:
        for manager in self.managers:
            manager.free_resources(request)

    def discard_resources(self, request: LlmRequest) -> Sequence[int]:
        return [block for manager in self.managers for block in manager.discard_resources(request)]

    def shutdown(self) -> None:
        for manager in self.managers:
            manager.shutdown()
