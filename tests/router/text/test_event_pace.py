"""Many sequences of fast steps: fewer deltas than tokens, none lost, and first tokens at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from tensorweave.cluster.chunk_inbox import ChunkInbox
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import build_policy
from tensorweave.router.text.event_pace import EventPace
from tensorweave.router.text.generation import Job, TextDelta, TokensOnly, generate_all
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeFleet, FakeLink
from tests.router.fake_logprobs import fake_logprobs
from tests.router.serving import model_info

STEP_S = 0.01
NUM_TOKENS = 50


class SteppingLink(FakeLink):
    """A gang whose steps do not wait for whoever reads the answers."""

    def __init__(self, *, tells_logprobs: bool = False) -> None:
        super().__init__(model_info())
        self._tells_logprobs = tells_logprobs

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        inbox = ChunkInbox()

        async def step() -> None:
            for at in range(NUM_TOKENS):
                await asyncio.sleep(STEP_S)
                told = [fake_logprobs(at, 1, 100)] if self._tells_logprobs else []
                is_last = at == NUM_TOKENS - 1
                inbox.put(TokenChunk(request.request_id, [at], "length" if is_last else None, start=at, logprobs=told))

        steps = asyncio.create_task(step())
        try:
            while True:
                chunk = await inbox.get()
                yield chunk
                if chunk.is_last:
                    return
        finally:
            steps.cancel()


async def _read(link: FakeLink, num_sequences: int, pace: EventPace) -> list[list[tuple[float, TextDelta]]]:
    now_s = asyncio.get_running_loop().time
    dispatcher = Dispatcher(FakeFleet(link), build_policy("round_robin"))

    async def read(name: str) -> list[tuple[float, TextDelta]]:
        job = Job(0, GenerateRequest(name, [1, 2, 3], SamplingSpec(NUM_TOKENS)), TokensOnly(), frozenset())
        async with aclosing(generate_all(dispatcher, [job], pace)) as deltas:
            return [(now_s(), delta) async for delta in deltas]

    return list(await asyncio.gather(*[read(f"r{i}") for i in range(num_sequences)]))


def _run(num_sequences: int, most_per_s: float, link: FakeLink | None = None) -> list[list[tuple[float, TextDelta]]]:
    async def run() -> list[list[tuple[float, TextDelta]]]:
        pace = EventPace(most_per_s, asyncio.get_running_loop().time)
        return await _read(link or SteppingLink(), num_sequences, pace)

    return run_stepped(run())


def test_the_deltas_of_all_together_keep_the_rate_and_no_token_is_lost_or_late() -> None:
    answers = _run(num_sequences=200, most_per_s=5000)
    for answer in answers:
        assert [token for _, delta in answer for token in delta.token_ids] == list(range(NUM_TOKENS))
        assert answer[0][1].num_tokens == 1
        assert answer[0][0] == pytest.approx(STEP_S), "the first token does not wait"
        assert answer[-1][0] <= STEP_S * NUM_TOKENS + 0.05
    times = sorted(time_s for answer in answers for time_s, _ in answer)
    for place, time_s in enumerate(times):
        ahead = sum(1 for other in times[place : place + 2000] if other - time_s <= 0.1)
        assert ahead <= 0.1 * 5000 + 200, "the rate, and one delta of each"
    assert len(times) < 0.4 * 200 * NUM_TOKENS


@pytest.mark.parametrize(("num_sequences", "most_per_s"), [(40, 5000), (200, float("inf"))])
def test_each_step_is_told_by_itself_while_the_rate_is_kept(num_sequences: int, most_per_s: float) -> None:
    for answer in _run(num_sequences, most_per_s):
        assert [delta.num_tokens for _, delta in answer] == [1] * NUM_TOKENS


def test_tokens_that_cannot_be_joined_do_not_wait() -> None:
    for answer in _run(200, 5000, SteppingLink(tells_logprobs=True)):
        assert answer[-1][0] == pytest.approx(STEP_S * NUM_TOKENS)
        assert len(answer) == NUM_TOKENS
