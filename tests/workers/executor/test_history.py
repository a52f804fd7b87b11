"""Random histories of arrivals, cancels, preemptions and finishes, for every policy: the books are right throughout.

`DryRun` checks each step: budgets, block contents at every read, `audit()`, and that something runs. Each history ends
with all requests done in bounded steps and every block to be had again.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorweave.cluster.protocol import Retention, RetentionRange, SamplingSpec
from tensorweave.workers.executor.capacity_scheduler import CapacityPolicy, CapacityScheduler
from tensorweave.workers.executor.dry_run import DryRun
from tensorweave.workers.executor.micro_batch_scheduler import ChunkingPolicy
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import ResourceManager


@dataclass(frozen=True)
class Setting:
    num_blocks: int
    tokens_per_block: int
    reuse: bool
    partial_reuse: bool
    policy: CapacityPolicy
    max_batch_size: int
    max_num_tokens: int
    chunked: bool
    chunking: ChunkingPolicy
    vocab_size: int
    depth: int = 0


@dataclass(frozen=True)
class Arrival:
    """A prompt is a shared stem cut at `stem_len`, then `tail`; sizes are folded into what the pool can hold."""

    stem: int
    stem_len: int
    tail: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    salt: str | None = None
    retention: Retention | None = None
    stops: bool = False


@dataclass(frozen=True)
class Event:
    """Between two steps: who comes, who is cancelled (an index into the active ones), and how many steps follow."""

    arrivals: tuple[Arrival, ...]
    cancel: int | None
    num_steps: int


SETTINGS = st.builds(
    Setting,
    num_blocks=st.integers(2, 16),
    tokens_per_block=st.sampled_from([1, 2, 4, 8]),
    reuse=st.sampled_from([True, True, True, False]),
    partial_reuse=st.booleans(),
    policy=st.sampled_from(["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"]),
    max_batch_size=st.integers(1, 8),
    max_num_tokens=st.sampled_from([1, 3, 7, 12, 20, 40, 64]),
    chunked=st.sampled_from([True, True, False]),
    chunking=st.sampled_from(["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"]),
    vocab_size=st.integers(1, 4),
    depth=st.integers(0, 1),
)
PRIORITIES = st.sampled_from([0, 20, 35, 50, 100])
DURATIONS = st.sampled_from([None, 0.0, 0.05, 10.0])
RETENTIONS = st.builds(
    Retention,
    ranges=st.lists(
        st.builds(RetentionRange, st.integers(0, 20), st.sampled_from([None, 8, 30]), PRIORITIES, DURATIONS), max_size=2
    ).map(tuple),
    decode_priority=PRIORITIES,
    decode_duration_s=DURATIONS,
)
ARRIVALS = st.builds(
    Arrival,
    stem=st.integers(0, 2),
    stem_len=st.integers(0, 60),
    tail=st.lists(st.integers(0, 3), max_size=6).map(tuple),
    max_tokens=st.integers(1, 40),
    priority=st.sampled_from([0, 0, 0, 1]),
    salt=st.sampled_from([None, None, None, "a", "b"]),
    retention=st.none() | RETENTIONS,
    stops=st.sampled_from([False, False, True]),
)
EVENTS = st.builds(
    Event,
    arrivals=st.lists(ARRIVALS, max_size=4).map(tuple),
    cancel=st.none() | st.integers(0, 7),
    num_steps=st.integers(0, 6),
)
STEMS = [[(i * i // (stem + 2)) % 4 for i in range(60)] for stem in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"])
def test_random_histories_leave_no_block_and_no_request_behind(policy: CapacityPolicy) -> None:
    seen = {"histories": 0, "steps": 0, "paused": 0, "reused": 0, "copied": 0, "cancelled": 0}

    @settings(max_examples=1200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(setting=SETTINGS, events=st.lists(EVENTS, min_size=1, max_size=6))
    def play(setting: Setting, events: list[Event]) -> None:
        setting = dataclasses.replace(setting, policy=policy)
        dry_run = _dry_run(setting)
        for event in events:
            for arrival in event.arrivals:
                _arrive(dry_run, setting, arrival)
            if event.cancel is not None and event.cancel < len(dry_run.active):
                dry_run.cancel(dry_run.active[event.cancel])
            for _ in range(event.num_steps):
                dry_run.step()
        dry_run.run()
        kv = dry_run.resources.kv_cache
        seen["histories"] += 1
        seen["steps"] += dry_run.num_steps
        seen["paused"] += sum(request.num_preemptions for request in dry_run.finished)
        seen["reused"] += int(kv.stats()["reusedBlocks"])
        seen["copied"] += sum(request.num_cached_tokens % setting.tokens_per_block for request in dry_run.finished)
        seen["cancelled"] += sum(request.finish_reason == "cancelled" for request in dry_run.finished)

    play()
    print(policy, seen)
    assert seen["histories"] >= 1200
    assert min(seen["reused"], seen["copied"], seen["cancelled"]) > 200, "the histories do not reach what they are for"
    assert seen["paused"] > 100 if policy == "MAX_UTILIZATION" else seen["paused"] == 0


@pytest.mark.no_cover
@pytest.mark.parametrize("reuse", [True, False])
def test_a_pool_too_small_for_its_requests_preempts_and_still_serves_all(reuse: bool) -> None:
    num_paused = 0
    for seed in range(400):
        draw = random.Random(seed)
        setting = Setting(
            num_blocks=draw.randint(3, 12),
            tokens_per_block=draw.choice([1, 2, 4]),
            reuse=reuse,
            partial_reuse=draw.random() < 0.5,
            policy="MAX_UTILIZATION",
            max_batch_size=draw.randint(2, 8),
            max_num_tokens=draw.randint(2, 40),
            chunked=draw.random() < 0.8,
            chunking=draw.choice(["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"]),
            vocab_size=64,
            depth=seed % 2,
        )
        dry_run = _dry_run(setting)
        for _ in range(12):
            tail = tuple(draw.choices(range(64), k=draw.randint(1, 10)))
            stem_len = draw.choice([0, 0, 5, 11])
            _arrive(dry_run, setting, Arrival(0, stem_len, tail, draw.randint(1, 40), draw.choice([0, 0, 1])))
            for _ in range(draw.choice([0, 0, 3])):
                dry_run.step()
        dry_run.run()
        num_paused += sum(request.num_preemptions for request in dry_run.finished)
    print("paused", num_paused)
    assert num_paused > 500


@settings(max_examples=100, deadline=None, derandomize=True)
@given(setting=SETTINGS, arrivals=st.lists(ARRIVALS, min_size=1, max_size=8))
def test_two_ranks_decide_alike(setting: Setting, arrivals: list[Arrival]) -> None:
    ranks = [_dry_run(setting), _dry_run(setting)]
    for rank in ranks:
        for arrival in arrivals:
            _arrive(rank, setting, arrival)
    while ranks[0].active:
        plans = [rank.step() for rank in ranks]
        spans = [[(c.request.order, c.start, c.length) for c in plan.context] for plan in plans]
        orders = [[r.order for r in (*(row.request for row in plan.generation), *plan.paused)] for plan in plans]
        tables = [[rank.resources.kv_cache.block_ids(r) for r in rank.active if r.is_started] for rank in ranks]
        assert (spans[0], orders[0], tables[0]) == (spans[1], orders[1], tables[1])
    assert not ranks[1].active


class DraftingScheduler(SimpleScheduler):
    """Plans several samples for a decode, within what is reserved for its request and the step's budget. Its requests
    grow faster than one token a step, so blocks of others that will have ended cannot be counted on."""

    def __init__(self, kv_cache: KVCacheManager, **knobs: Any) -> None:
        super().__init__(kv_cache, **knobs)
        max_requests = min(knobs["max_batch_size"], knobs["max_num_tokens"])
        self.capacity = CapacityScheduler(kv_cache, knobs["policy"], max_requests, counts_on_ends=False)

    def schedule_request(self, active: Sequence[LlmRequest]) -> ScheduledBatch:
        batch = super().schedule_request(active)
        num_left = MAX_DRAFTED_TOKENS - batch.num_tokens
        rows = []
        for request, start, _, _ in batch.generation:
            num_drafts = min((request.order + start) % 5, request.max_len - 2 - start, num_left)
            num_left -= num_drafts
            rows.append(StepRow(request, start, 1 + num_drafts, 1 + num_drafts))
        return dataclasses.replace(batch, generation=tuple(rows))


MAX_DRAFTED_TOKENS = 64


@settings(max_examples=200, deadline=None, derandomize=True)
@given(setting=SETTINGS, arrivals=st.lists(ARRIVALS, min_size=1, max_size=6))
def test_tokens_that_were_drafted_in_vain_leave_nothing_behind(setting: Setting, arrivals: list[Arrival]) -> None:
    """Rows of several samples, of which some are rejected and their blocks given back: the tokens are the same."""
    setting = dataclasses.replace(setting, policy="GUARANTEED_NO_EVICT", max_num_tokens=MAX_DRAFTED_TOKENS, depth=0)
    plain, drafting = _dry_run(setting), _dry_run(setting, DraftingScheduler)
    for dry_run in (plain, drafting):
        for arrival in arrivals:
            _arrive(dry_run, setting, arrival)
        dry_run.run()
    tokens = [{request.order: request.tokens for request in dry_run.finished} for dry_run in (plain, drafting)]
    assert tokens[0] == tokens[1]
    assert drafting.num_steps <= plain.num_steps


@settings(max_examples=200, deadline=None, derandomize=True)
@given(setting=SETTINGS, arrivals=st.lists(ARRIVALS, min_size=1, max_size=6))
def test_tokens_do_not_depend_on_policy_pool_or_reuse(setting: Setting, arrivals: list[Arrival]) -> None:
    """The next token hashes the KV history, so equal tokens mean that every request saw its own context, whole."""
    dry_run = _dry_run(setting)
    for arrival in arrivals:
        _arrive(dry_run, setting, arrival)
    dry_run.run()
    for request in dry_run.finished:
        alone = DryRun(
            ResourceManager([kv := KVCacheManager(1000, 4, enable_block_reuse=False)]),
            SimpleScheduler(kv),
            max_batch_size=256,
            max_num_tokens=2048,
            vocab_size=setting.vocab_size,
        )
        prompt = request.tokens[: request.prompt_len]
        twin = LlmRequest("alone", 1, prompt, len(prompt), request.sampling, cache_salt=request.cache_salt)
        alone.add(twin)
        alone.run()
        assert twin.tokens == request.tokens


def _dry_run(setting: Setting, make_scheduler: type[SimpleScheduler] = SimpleScheduler) -> DryRun:
    kv = KVCacheManager(setting.num_blocks, setting.tokens_per_block, setting.reuse, setting.partial_reuse)
    scheduler = make_scheduler(
        kv,
        policy=setting.policy,
        max_batch_size=setting.max_batch_size,
        max_num_tokens=setting.max_num_tokens,
        enable_chunked_prefill=setting.chunked,
        chunking_policy=setting.chunking,
    )
    return DryRun(
        ResourceManager([kv]),
        scheduler,
        max_batch_size=setting.max_batch_size,
        max_num_tokens=setting.max_num_tokens,
        vocab_size=setting.vocab_size,
        depth=setting.depth,
    )


def _arrive(dry_run: DryRun, setting: Setting, arrival: Arrival) -> None:
    scheduler = dry_run.scheduler
    assert isinstance(scheduler, SimpleScheduler)
    prompt = STEMS[arrival.stem][: arrival.stem_len] + list(arrival.tail) or [0]
    prompt = prompt[: min(scheduler.max_prompt_tokens, scheduler.max_request_tokens - 1)]
    max_tokens = min(arrival.max_tokens, scheduler.max_request_tokens - len(prompt))
    scheduler.check(len(prompt), max_tokens)
    order = dry_run.num_added
    stops = (0,) if arrival.stops else ()
    dry_run.add(
        LlmRequest(
            f"request-{order}",
            order,
            prompt,
            len(prompt),
            SamplingSpec(max_tokens, stop_token_ids=stops),
            priority=arrival.priority,
            cache_salt=arrival.salt,
            retention=arrival.retention,
        )
    )
