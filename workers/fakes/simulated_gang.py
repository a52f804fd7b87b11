"""`SimulatedGang`: a gang's scheduler and KV cache manager on a stepped clock, where a `CostModel` says how long a step
takes. For simulations of hundreds of gangs (`tensorweave replay --simulate`).

Steps in which the same requests decode are taken at once, up to the first that ends; a request that arrives meanwhile
cuts them short at the end of the step that is under way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.protocol import GenerateRequest, TokenChunk
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.workers.executor.bookkeeping import book_launch, book_result
from tensorweave.workers.executor.prompt_share import BalancedShare, FixedShare
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.events import CacheEvents
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.kv.prefix_tree import Node
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.result import StepResult

_MOST_WITH_WAITING: Final = 32
"""Steps that are taken at once while requests wait for KV blocks: with each step fewer blocks are still to be used."""
_MOST_EVENTS: Final = 1 << 20
_TOKEN: Final = 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step: linear in its prompt tokens, their context, its decodes and the KV that these read."""

    fixed_s: float
    per_prompt_token_s: float
    per_prompt_context_s: float
    per_decode_s: float
    per_kv_token_s: float

    def seconds(self, features: Sequence[float]) -> float:
        """`features` as `step_features` returns them."""
        _, prompt, context, decodes, kv = features
        return (
            self.fixed_s
            + self.per_prompt_token_s * prompt
            + self.per_prompt_context_s * context
            + self.per_decode_s * decodes
            + self.per_kv_token_s * kv
        )


def step_features(batch: ScheduledBatch) -> tuple[float, float, float, float, float]:
    """(1, prompt tokens, tokens that these attend to, decodes, tokens that these attend to)."""
    prompt = sum([row.length for row in batch.context])
    context = sum([row.length * (row.start + row.length / 2) for row in batch.context])
    kv = sum([row.start + row.length / 2 for row in batch.generation])
    return 1.0, prompt, context, len(batch.generation), kv


@dataclass(frozen=True, slots=True)
class GangShape:
    """`layer_weights` are those of a layer on one rank; by default an 8B model's."""

    num_blocks: int
    tokens_per_block: int
    steps: StepSettings
    layer_weights: int = 218 * 10**6


@dataclass(slots=True)
class _Flight:
    batch: ScheduledBatch
    began_s: float
    step_s: float
    num_steps: int


class _NamedEvents(CacheEvents):
    """Events without the blocks' tokens, which take most of a simulation's time."""

    def stored(self, node: Node) -> None:
        assert node.parent is not None
        blocks = [{"block_hash": node.digest.hex()}]
        self._add({"type": "stored", "parent_hash": node.parent.digest.hex(), "blocks": blocks})


class _NamingManager(KVCacheManager):
    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        super().__init__(num_blocks, tokens_per_block)
        self._events = _NamedEvents(_MOST_EVENTS, num_blocks)


class SimulatedGang:
    """Lives on an event loop, by whose clock its steps take time."""

    def __init__(self, shape: GangShape, cost: CostModel, on_events: Callable[[list[dict[str, Any]]], None]) -> None:
        self._kv = _NamingManager(shape.num_blocks, shape.tokens_per_block)
        steps, most = shape.steps, shape.steps.max_prompt_tokens_beside_decodes
        balanced = BalancedShare(self._kv, most, shape.layer_weights)
        self._scheduler = SimpleScheduler(
            self._kv,
            max_batch_size=steps.max_batch_size,
            max_num_tokens=steps.max_num_tokens,
            share=balanced if steps.balances_prompts else FixedShare(most),
        )
        self._resources = ResourceManager([self._kv])
        self._cost = cost
        self._on_events = on_events
        self._active: list[LlmRequest] = []
        self._tells: dict[str, Callable[[TokenChunk], None]] = {}
        self._flight: _Flight | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._num_arrived = 0
        self.busy_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Nothing runs or waits, and all KV blocks are to be had."""
        return not self._active and self._flight is None and self._kv.available == self._kv.num_blocks

    def audit(self) -> list[str]:
        """What is wrong with the KV cache manager's books."""
        return self._kv.audit()

    def add(self, asked: GenerateRequest, tell: Callable[[TokenChunk], None]) -> None:
        """Start a request; `tell` gets its chunks. Raises RequestRejected if it can never run."""
        self._scheduler.check(len(asked.prompt_token_ids), asked.sampling.max_tokens)
        self._num_arrived += 1
        self._tells[asked.request_id] = tell
        self._active.append(LlmRequest.of(asked, self._num_arrived, self._now_s(), can_fetch=False))
        self._interrupt()

    def cancel(self, request_id: str) -> None:
        if self._tells.pop(request_id, None) is None:
            return
        request = next(each for each in self._active if each.request_id == request_id)
        request.finish_reason, request.state = "cancelled", RequestState.DONE
        self._active.remove(request)
        if self._flight is None or request not in [row.request for row in _rows(self._flight.batch)]:
            self._resources.free_resources(request)
        self._interrupt()

    def _interrupt(self) -> None:
        """Something has changed: the steps after the one that is under way are planned anew."""
        flight, loop = self._flight, asyncio.get_running_loop()
        if flight is None:
            if self._timer is None:
                self._timer = loop.call_soon(self._begin)  # type: ignore[assignment]
            return
        num_begun = max(1, math.ceil((loop.time() - flight.began_s) / flight.step_s))
        if num_begun < flight.num_steps:
            assert self._timer is not None
            self._timer.cancel()
            flight.num_steps = num_begun
            self._timer = loop.call_at(flight.began_s + num_begun * flight.step_s, self._settle)

    def _begin(self) -> None:
        self._timer = None
        if not self._active:
            return
        self._kv.now_s = self._now_s()
        batch = self._scheduler.schedule_request(tuple(self._active))
        for request in batch.paused:
            self._resources.free_resources(request)
            request.pause()
        if batch.is_empty:
            return
        num_steps = self._num_alike(batch)
        if num_steps > 1:
            batch = ScheduledBatch((), _stretched(batch, num_steps))
        self._resources.prepare_resources(batch)
        self._kv.take_copies()
        step_s = self._cost.seconds(step_features(batch))
        self._flight = _Flight(batch, self._now_s(), step_s, num_steps)
        self._timer = asyncio.get_running_loop().call_later(num_steps * step_s, self._settle)

    def _num_alike(self, batch: ScheduledBatch) -> int:
        """How many steps are like this one: all requests decode, and none ends before the last of them."""
        if batch.context:
            return 1
        most = min([row.request.max_len - len(row.request.tokens) for row in batch.generation])
        is_all = len(batch.generation) == len(self._active)
        return max(1, most if is_all else min(most, _MOST_WITH_WAITING))

    def _settle(self) -> None:
        flight = self._flight
        assert flight is not None
        self._flight = None
        self.busy_s += flight.num_steps * flight.step_s
        batch = flight.batch
        if not batch.context:
            batch = ScheduledBatch((), _stretched(batch, flight.num_steps))
        gone = [row.request for row in _rows(batch) if row.request.state is RequestState.DONE]
        batch = ScheduledBatch(_without(batch.context, gone), _without(batch.generation, gone))
        book_launch(batch)
        settled = book_result(batch, StepResult([[_TOKEN] * row.num_samples for row in batch.sampled]))
        self._resources.update_resources(batch)
        for request in settled.ended:
            request.state = RequestState.DONE
            self._active.remove(request)
        for request in (*settled.ended, *gone):
            self._resources.free_resources(request)
        if events := self._kv.take_events():
            self._on_events(events)
        for chunk in settled.chunks:
            tell = self._tells[chunk.request_id]
            if chunk.is_last:
                del self._tells[chunk.request_id]
            tell(chunk)
        self._begin()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _rows(batch: ScheduledBatch) -> tuple[StepRow, ...]:
    return batch.context + batch.generation


def _without(rows: Sequence[StepRow], gone: Sequence[LlmRequest]) -> tuple[StepRow, ...]:
    return tuple(row for row in rows if row.request not in gone) if gone else tuple(rows)


def _stretched(batch: ScheduledBatch, num_steps: int) -> tuple[StepRow, ...]:
    """The decodes of so many steps in one."""
    return tuple(StepRow(row.request, row.start, num_steps, num_steps) for row in batch.generation)
