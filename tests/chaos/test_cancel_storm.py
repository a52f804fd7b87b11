"""Storms of 500 cancels in each phase of a disaggregated request: queued, prefill, hand-off, transfer, decode.

The engines are held in their steps, so that every request is in its phase when it is cancelled. After the last cancel
all blocks are free and all gauges are back within a second, on both gangs, and the next request gets the right tokens.
The second is counted in short waits of a thread of the same process, so that it is longer if the process is paused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.fakes.fake_engine import HashStep, hash_token
from tensorweave.workers.step.pending import StepLogits
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.transfer.carriers.loop import LoopNetwork
from tests.workers.stepped_engine import SteppedEngine
from tests.workers.transfer_drive import Client, Gang, loop_carriers, request_pair, run_disaggregated, tcp_carriers
from tests.workers.waiting import WAIT_S

NUM_CANCELS = 500
WAVE = 250  # a scheduler lets 256 requests hold blocks
BACK_WITHIN_S = 1.0
LOOK_S = 0.01
PATIENCE_S = 600.0  # of a fetch and a lease: it is the cancel that ends them
SAMPLING = SamplingSpec(max_tokens=400)
MOMENTARY = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "kv_transfer_open_fetches",
    "kv_transfer_open_leases",
    "kv_transfer_held_blocks",
)


class HeldEngine(SteppedEngine):
    """Runs free until it is held; then it computes a step only when it may."""

    def __init__(self) -> None:
        super().__init__(num_blocks=16_384, tokens_per_block=8)
        self.num_begun = 0
        self.pace_s = 0.0  # of every step
        self.run_free()

    def hold(self) -> None:
        with self._changed:
            self._runs_free, self._num_allowed = False, 0

    def step(self) -> None:
        """Let one step compute, and wait for the next to begin."""
        num_begun = self.num_begun
        self.allow()
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_begun > num_begun, WAIT_S)

    def compute(self, step: HashStep) -> StepLogits:
        with self._changed:
            self.num_begun += 1
            self._changed.notify_all()
        time.sleep(self.pace_s)
        return super().compute(step)


@dataclass
class Side:
    """One gang of one rank, and the engine that holds it."""

    gang: Gang
    engine: HeldEngine

    def ask(self, request: GenerateRequest) -> str:
        return self.gang.leader.enqueue_request(request)

    def cancel(self, names: Sequence[str]) -> None:
        for name in names:
            self.gang.leader.cancel_request(name)

    def those(self, holds: Callable[[LlmRequest], bool]) -> list[str]:
        return [request.request_id for request in self.gang.leader._loop.requests if holds(request)]

    def gauges(self) -> dict[str, float]:
        gauges = self.gang.leader.gauges()
        return {name: gauges[name] for name in MOMENTARY}

    def wait_back(self) -> None:
        """Until all is as at the start."""
        for _ in range(round(BACK_WITHIN_S / LOOK_S)):
            if not any(self.gauges().values()) and not self.gang._open():
                break
            time.sleep(LOOK_S)
        self.gang.wait_idle(0.0)
        assert not any(self.gauges().values()), self.gauges()


@dataclass
class Pair:
    prefill: Side
    decode: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.prefill, self.decode

    def hold(self) -> None:
        for side in self.sides:
            side.engine.hold()

    def release(self) -> None:
        for side in self.sides:
            side.engine.run_free()


@pytest.fixture(params=["tcp", "loop"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    carriers = tcp_carriers if request.param == "tcp" else loop_carriers(LoopNetwork())
    with ExitStack() as closing:
        sides = []
        for name in ("prefill", "decode"):
            engine = HeldEngine()
            gang = Gang(lambda comm, e=engine: e, 1, carriers, name=name, timeout_s=PATIENCE_S, lease_s=PATIENCE_S)
            sides.append(Side(closing.enter_context(gang), engine))
        pair = Pair(*sides)
        closing.callback(pair.release)
        yield pair


@pytest.fixture(autouse=True)
def unharmed(pair: Pair) -> Iterator[None]:
    """Checks after every storm."""
    assert not any(value for side in pair.sides for value in side.gauges().values())
    yield
    for side in pair.sides:
        side.wait_back()
        client = Client(side.gang)
        client.take(side.gang.leader.await_responses(timeout_s=0.0))
    prompt = prompt_of(0, 77)
    answers = run_disaggregated(pair.prefill.gang, pair.decode.gang, [prompt], [SamplingSpec(max_tokens=20)], "after")
    assert answers[0].tokens == oracle(prompt, 20)


def oracle(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, 1000))
    return tokens[len(prompt) :]


def prompt_of(number: int, length: int = 40) -> list[int]:
    """Prompts that share no block."""
    return [(number * 31 + place * 7) % 997 if place else number for place in range(length)]


def until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {what}"
        time.sleep(0.002)


def names_of(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def test_queued(pair: Pair) -> None:
    side = pair.prefill
    side.engine.hold()
    side.ask(GenerateRequest("first", prompt_of(0), SAMPLING))
    until(lambda: bool(side.those(lambda request: True)), "the first request is in its step")
    names = [side.ask(GenerateRequest(n, prompt_of(i), SAMPLING)) for i, n in enumerate(names_of("q", NUM_CANCELS))]
    assert side.gauges()["num_requests_waiting"] >= NUM_CANCELS
    side.cancel([*names, "first"])
    pair.release()


def test_prefill(pair: Pair) -> None:
    """Prompts of several chunks; each is cancelled when a part of it has been computed and offered, and more than the
    chunk of the step that is held is still to come."""
    side, chunk = pair.prefill, 256
    side.engine.hold()
    for number, name in enumerate(names_of("p", NUM_CANCELS)):
        side.ask(GenerateRequest(name, prompt_of(number, 4 * chunk), SAMPLING, offer=f"ticket-{name}"))
    until(lambda: side.engine.num_begun == 1, "the first step has begun")
    cancelled: set[str] = set()
    while len(cancelled) < NUM_CANCELS:
        side.engine.step()
        begun = side.those(lambda r: 0 < r.num_computed < r.context_len - chunk)
        fresh = [name for name in begun if name not in cancelled]
        side.cancel(fresh)
        cancelled.update(fresh)
    assert side.gauges()["kv_transfer_open_leases"] == 0
    pair.release()


def test_hand_off(pair: Pair) -> None:
    """The prompts are computed and wait for a decode gang that never comes: the router gives them up."""
    side = pair.prefill
    names = names_of("h", NUM_CANCELS)
    for number, name in enumerate(names):
        side.ask(GenerateRequest(name, prompt_of(number), SAMPLING, offer=f"ticket-{name}"))
    until(lambda: side.gauges()["kv_transfer_open_leases"] == NUM_CANCELS, "all prompts are leased")
    assert side.gauges()["kv_transfer_held_blocks"] == NUM_CANCELS * 5
    assert side.gauges()["kv_cache_usage_perc"] > 0.1
    side.cancel(names)


@pytest.mark.parametrize("decode_first", [True, False], ids=["decode-first", "prefill-first"])
def test_transfer(pair: Pair, decode_first: bool) -> None:
    """The prefill gang is held in the middle of its prompts: some blocks have arrived, others are awaited."""
    num_cancelled = wave = 0
    while num_cancelled < NUM_CANCELS:
        pair.hold()
        requests = [
            request_pair(f"t{wave}-{number}", prompt_of(wave * WAVE + number), SAMPLING, pair.prefill.gang.source)
            for number in range(WAVE)
        ]
        for for_prefill, for_decode in requests:
            pair.prefill.ask(for_prefill)
            pair.decode.ask(for_decode)
        until(lambda: pair.prefill.gauges()["num_requests_waiting"] > 0, "the prompts are being computed")
        for _ in range(4):
            pair.prefill.engine.step()
        until(lambda: pair.decode.gauges()["num_requests_running"] == WAVE, "the decode gang has taken all")
        until(lambda: bool(pair.decode.those(lambda r: r.state is RequestState.GENERATION)), "some have arrived")
        num_cancelled += len(pair.decode.those(lambda request: request.state is RequestState.FETCHING))
        prefills, decodes = ([request.request_id for request in side] for side in zip(*requests, strict=True))
        storm = [(pair.prefill, prefills), (pair.decode, decodes)]
        for side, names in reversed(storm) if decode_first else storm:
            side.cancel(names)
        pair.release()
        for side in pair.sides:
            side.wait_back()
        wave += 1


def test_decode(pair: Pair) -> None:
    """Requests whose prompts came from the other gang, in the middle of their answers.

    No step is done before all have been asked for, and then the steps are so slow that none is at its end as long as
    we wait for the last to land."""
    for wave in range(NUM_CANCELS // WAVE):
        pair.decode.engine.hold()
        pair.decode.engine.pace_s = WAIT_S / SAMPLING.max_tokens
        names = []
        for number in range(WAVE):
            source = pair.prefill.gang.source
            for_prefill, for_decode = request_pair(
                f"d{wave}-{number}", prompt_of(wave * WAVE + number), SAMPLING, source
            )
            pair.prefill.ask(for_prefill)
            names.append(pair.decode.ask(for_decode))
        pair.decode.engine.run_free()
        until(lambda: len(pair.decode.those(lambda r: r.state is RequestState.GENERATION)) == WAVE, "all are decoding")
        pair.decode.engine.hold()
        assert len(pair.decode.those(lambda request: request.num_output > 0)) == WAVE
        pair.decode.cancel(names)
        pair.decode.engine.pace_s = 0.0
        pair.decode.engine.run_free()
        for side in pair.sides:
            side.wait_back()


def test_at_random_moments(pair: Pair) -> None:
    """Nothing is held; every third goes on to its end, and gets the right tokens."""
    client = Client(pair.prefill.gang, pair.decode.gang)
    kept: dict[str, list[int]] = {}
    for number in range(NUM_CANCELS * 3 // 2):
        prompt = prompt_of(number, 8 + number % 90)
        sampling = SamplingSpec(max_tokens=12 if number % 3 == 0 else 400)
        for_prefill, for_decode = request_pair(f"m{number}", prompt, sampling, pair.prefill.gang.source)
        pair.prefill.ask(for_prefill)
        pair.decode.ask(for_decode)
        if number % 3 == 0:
            kept[for_decode.request_id] = oracle(prompt, 12)
        elif number % 3 == 1:
            pair.decode.cancel([for_decode.request_id])
            pair.prefill.cancel([for_prefill.request_id])
        else:
            pair.decode.cancel([f"m{number}/d"] + [f"m{old}/d" for old in range(number - 9, number) if old % 3 == 2])
            pair.prefill.cancel([f"m{number}/p"])
    answers = client.wait(list(kept))
    assert [answer.tokens for answer in answers] == list(kept.values())
