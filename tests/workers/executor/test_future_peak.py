"""Admission by the future peak: the bound against a plain count step by step, and random loads in pools that are just
large enough, in which no step may lack a block and no request pauses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.executor.dry_run import DryRun
from tensorweave.workers.executor.future_peak import STEPS_TO_RELEASE, future_peak
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager


def decoding(num_launched: int, num_left: int) -> LlmRequest:
    """It decodes `num_left` times more, and its last token needs no KV."""
    request = LlmRequest("r", 0, [1] * num_launched, num_launched, SamplingSpec(num_left + 1))
    request.num_launched, request.state = num_launched, RequestState.GENERATION
    return request


def test_one_request_grows_to_its_end() -> None:
    assert future_peak([], [], 4) == (0, 0)
    assert future_peak([decoding(4, 1)], [1], 4) == (1, 1)
    assert future_peak([decoding(5, 3)], [2], 4) == (0, 0)
    assert future_peak([decoding(5, 4)], [2], 4) == (1, 1)


def test_what_ends_makes_room_for_what_grows() -> None:
    """The first ends after one step; its blocks are there three steps later, when the second takes its third one."""
    assert STEPS_TO_RELEASE == 2
    early, late = decoding(12, 1), decoding(4, 40)
    assert future_peak([early, late], [3, 1], 4) == (10 - 3, 1 + 10)
    assert future_peak([early, late], [0, 1], 4) == (10, 1 + 10)
    assert future_peak([early, decoding(4, 3)], [3, 1], 4) == (2, 2)


requests = st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(0, 10))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sizes=st.lists(requests, min_size=1, max_size=9), tokens_per_block=st.sampled_from([1, 2, 3, 4, 8, 32]))
def test_the_peak_is_that_of_a_count_step_by_step(sizes: list[tuple[int, int, int]], tokens_per_block: int) -> None:
    def blocks(num_tokens: int) -> int:
        return -(-num_tokens // tokens_per_block)

    def change(launched: int, left: int, freed: int, step: int) -> int:
        grown = blocks(launched + min(step, left)) - blocks(launched)
        return grown if step <= left + STEPS_TO_RELEASE else -freed

    sizes = [(launched, left, min(freed, blocks(launched))) for launched, left, freed in sizes]
    peak = max(sum(change(*size, step) for size in sizes) for step in range(80))
    total = sum(blocks(launched + left) - blocks(launched) for launched, left, _ in sizes)
    decodings = [decoding(launched, left) for launched, left, _ in sizes]
    assert future_peak(decodings, [freed for *_, freed in sizes], tokens_per_block) == (max(0, peak), total)


@dataclass(frozen=True)
class Load:
    num_spare_blocks: int
    tokens_per_block: int
    reuse: bool
    partial_reuse: bool
    max_batch_size: int
    max_num_tokens: int
    depth: int
    vocab_size: int


@dataclass(frozen=True)
class Prompt:
    stem: int
    stem_len: int
    tail: tuple[int, ...]
    max_tokens: int
    stops: bool
    priority: int
    num_steps_before: int
    cancels: int


LOADS = st.builds(
    Load,
    num_spare_blocks=st.integers(0, 12),
    tokens_per_block=st.sampled_from([1, 2, 4]),
    reuse=st.booleans(),
    partial_reuse=st.booleans(),
    max_batch_size=st.integers(2, 12),
    max_num_tokens=st.sampled_from([3, 8, 20, 64]),
    depth=st.integers(0, 1),
    vocab_size=st.integers(1, 3),
)
PROMPTS = st.builds(
    Prompt,
    stem=st.integers(0, 1),
    stem_len=st.integers(0, 14),
    tail=st.lists(st.integers(0, 2), max_size=3).map(tuple),
    max_tokens=st.integers(1, 24),
    stops=st.sampled_from([False, False, False, True]),
    priority=st.sampled_from([0, 0, 0, 1]),
    num_steps_before=st.sampled_from([0, 0, 1, 2, 5]),
    cancels=st.sampled_from([-1, -1, -1, -1, 0, 3]),
)


@pytest.mark.no_cover
def test_no_step_of_any_load_lacks_a_block() -> None:
    """The KV cache manager raises ValueError where a step takes more blocks than there are."""
    num_sums_exceeded = 0

    @settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(load=LOADS, prompts=st.lists(PROMPTS, min_size=2, max_size=14))
    def play(load: Load, prompts: list[Prompt]) -> None:
        nonlocal num_sums_exceeded
        num_sums_exceeded += serve(load, prompts)

    play()
    assert num_sums_exceeded > 200, "the sum of the maxima would have let in as many"


def serve(load: Load, prompts: list[Prompt]) -> int:
    """Run a load to its end. Return in how many steps the maxima of what runs are together more than the pool."""
    lengths = [prompt.stem_len + len(prompt.tail) or 1 for prompt in prompts]
    longest = max(length + prompt.max_tokens - 1 for length, prompt in zip(lengths, prompts, strict=True))
    kv = KVCacheManager(
        -(-longest // load.tokens_per_block) + load.num_spare_blocks,
        load.tokens_per_block,
        load.reuse,
        load.partial_reuse,
    )
    knobs = {"max_batch_size": load.max_batch_size, "max_num_tokens": load.max_num_tokens}
    scheduler = SimpleScheduler(kv, **knobs)
    dry_run = DryRun(ResourceManager([kv]), scheduler, **knobs, vocab_size=load.vocab_size, depth=load.depth)
    num_exceeded = 0

    def step() -> None:
        nonlocal num_exceeded
        dry_run.step()
        running = [request for request in dry_run.active if request.is_started]
        num_exceeded += sum(map(kv.get_needed_resource_to_completion, running)) > kv.num_blocks

    for order, prompt in enumerate(prompts):
        for _ in range(prompt.num_steps_before):
            step()
        if 0 <= prompt.cancels < len(dry_run.active):
            dry_run.cancel(dry_run.active[prompt.cancels])
        tokens = [(prompt.stem + at) % 3 for at in range(prompt.stem_len)] + list(prompt.tail) or [0]
        sampling = SamplingSpec(prompt.max_tokens, stop_token_ids=(0,) if prompt.stops else ())
        dry_run.add(LlmRequest(f"r{order}", order, tokens, len(tokens), sampling, priority=prompt.priority))
    for _ in range(2000):
        if not dry_run.active:
            break
        step()
    dry_run.run()
    assert all(request.num_preemptions == 0 for request in dry_run.finished)
    return num_exceeded
