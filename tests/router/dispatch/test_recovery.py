"""Gangs that die, hang, refuse or fail while running a request: its client gets the same tokens, once."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.cluster.errors import (
    DeadlineExceeded,
    LogitsNotFinite,
    NotReady,
    Overloaded,
    RequestRejected,
    TransferFailed,
    WorkerLost,
)
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.attempt import ORPHAN_WAIT_S
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import PolicyName, PolicySettings, build_policy
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeFleet, FakeLink, Fault, hash_token
from tests.router.serving import model_info

INFO = model_info()
PROMPT = [5, 6, 7]
CLOSES = Fault("error", closes=True)


def request_of(name: str = "r", max_tokens: int = 6, min_tokens: int = 0) -> GenerateRequest:
    return GenerateRequest(name, PROMPT, SamplingSpec(max_tokens=max_tokens, min_tokens=min_tokens, seed=3))


def oracle(max_tokens: int = 6) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(max_tokens):
        tokens.append(hash_token(tokens, 3, INFO))
    return tokens[len(PROMPT) :]


def gang(name: str, role: str = "both", **options: object) -> FakeLink:
    return FakeLink(INFO, gang_id=name, role=role, **{"step_s": 0.01, **options})  # type: ignore[arg-type]


def dispatcher_of(
    *links: FakeLink, policy: PolicyName = "round_robin", limits: Limits | None = None, min_prefill_tokens: int = 1
) -> Dispatcher:
    chosen = build_policy(policy, PolicySettings(min_prefill_tokens=min_prefill_tokens))
    return Dispatcher(FakeFleet(*links), chosen, limits or Limits(recovery_timeout_s=30))


async def collect(dispatcher: Dispatcher, request: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in dispatcher.generate(request)]


def check_answer(chunks: Sequence[TokenChunk], tokens: Sequence[int]) -> None:
    """Each token once, at its own position, under the request's own id, and one end."""
    assert [token for chunk in chunks for token in chunk.token_ids] == list(tokens)
    starts = [0, *itertools.accumulate(len(chunk.token_ids) for chunk in chunks)]
    assert [chunk.start for chunk in chunks] == starts[:-1]
    assert {chunk.request_id for chunk in chunks} == {"r"}
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def check_nothing_left(dispatcher: Dispatcher, links: Sequence[FakeLink]) -> None:
    assert (dispatcher.num_running, dispatcher.num_waiting) == (0, 0)
    for link in links:
        assert link.num_inflight == 0
        assert not link.held, f"{link.gang_id} still holds KV for {list(link.held)}"
        load = dispatcher.loads.of(link.gang_id)
        assert load.is_idle


def test_a_pair_says_each_token_once() -> None:
    async def run() -> None:
        links = [gang("p", "prefill", num_cached=2), gang("d", "decode", step_s=0.03, num_cached=1)]
        dispatcher = dispatcher_of(*links)
        loop = asyncio.get_running_loop()
        times_s, chunks = [], []
        async for chunk in dispatcher.generate(request_of()):
            times_s.append(loop.time())
            chunks.append(chunk)
        check_answer(chunks, oracle())
        assert times_s[0] == pytest.approx(0.01)  # the prefill gang's, not waiting for the decode gang's
        assert {chunk.num_cached_tokens for chunk in chunks} == {2}
        there, here = links[0].requests[0], links[1].requests[0]
        assert here.fetch is not None
        assert (there.request_id, here.request_id) == (f"r/p1-{here.fetch.ticket_id[:12]}", "r/d1")
        assert there.offer == here.fetch.ticket_id
        assert here.fetch.source == links[0].kv_source
        assert there.sampling == here.sampling == request_of().sampling
        assert links[0].released == [there.request_id]
        assert dispatcher.counts.routes == {"joint": 1}
        assert not dispatcher.counts.retries
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_the_decode_gang_may_be_first() -> None:
    async def run() -> None:
        links = [gang("p", "prefill", step_s=0.5), gang("d", "decode")]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert links[0].cancelled == [links[0].requests[0].request_id]
        check_nothing_left(dispatcher, links)

    run_stepped(run())


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_what_the_prefill_gang_had_cached_counts_though_the_decode_gang_is_first(max_tokens: int) -> None:
    async def run() -> None:
        links = [gang("p", "prefill", step_s=0.02, num_cached=2), gang("d", "decode", num_cached=1)]
        dispatcher = dispatcher_of(*links)
        chunks = await collect(dispatcher, request_of(max_tokens=max_tokens))
        check_answer(chunks, oracle(max_tokens))
        assert {chunk.num_cached_tokens for chunk in chunks} == {2}
        check_nothing_left(dispatcher, links)

    run_stepped(run())


@pytest.mark.parametrize(("sampling", "reason"), [({"max_tokens": 1}, "length"), ({"max_tokens": 9}, "stop")])
def test_a_first_token_that_ends_the_request(sampling: dict[str, int], reason: str) -> None:
    async def run() -> None:
        links = [gang("p", "prefill"), gang("d", "decode", step_s=0.5)]
        dispatcher = dispatcher_of(*links)
        spec = SamplingSpec(seed=3, stop_token_ids=tuple(oracle(1)) if reason == "stop" else (), **sampling)
        chunks = await collect(dispatcher, dataclasses.replace(request_of(), sampling=spec))
        assert [(list(chunk.token_ids), chunk.finish_reason) for chunk in chunks] == [(oracle(1), reason)]
        assert links[1].cancelled == ["r/d1"]
        check_nothing_left(dispatcher, links)

    run_stepped(run())


PREFILL_FAULTS = [
    CLOSES,
    Fault("error", error=TransferFailed("no link")),
    Fault("cancelled"),
    Fault("short"),
    Fault("hang"),
]


@pytest.mark.parametrize("fault", PREFILL_FAULTS, ids=lambda fault: f"{fault.kind}")
def test_a_lost_prefill_gang_costs_no_replay(fault: Fault) -> None:
    async def run() -> None:
        links = [gang("p", "prefill", faults=[fault]), gang("d", "decode", step_s=6.0)]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert len(links[1].requests) == 1
        assert sum(dispatcher.counts.faults.values()) == 1
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_kv_of_a_lost_request_is_not_waited_for_long() -> None:
    """The prefill gang has dropped us and lives on without the request; the decode gang waits for its KV in vain."""

    async def run() -> None:
        links = [gang("p", "prefill", faults=[Fault("error")]), gang("d", "decode", faults=[Fault("stall")])]
        dispatcher = dispatcher_of(*links)
        began_s = asyncio.get_running_loop().time()
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert asyncio.get_running_loop().time() - began_s < ORPHAN_WAIT_S + 5
        assert len(links[1].requests) == 2
        check_nothing_left(dispatcher, links)

    run_stepped(run())


@pytest.mark.parametrize(
    "refusal",
    [
        Overloaded("full"),
        RequestRejected("too long", param="prompt"),
        NotReady("stopping"),
        LogitsNotFinite.of_model(),
    ],
)
def test_a_prefill_gang_that_refuses_is_not_waited_for(refusal: Exception) -> None:
    async def run() -> None:
        fault = Fault("error", error=refusal)  # type: ignore[arg-type]
        links = [gang("p", "prefill", faults=[fault]), gang("d", "decode", step_s=0.5)]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert [request.fetch is None for request in links[1].requests] == [False, True]
        assert links[1].cancelled == ["r/d1"]
        assert dispatcher.counts.retries == {"prefill_refused": 1}
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_a_refusal_of_both_is_the_answer() -> None:
    async def run() -> None:
        error = RequestRejected("too long", param="prompt")
        links = [gang(name, role, fail_after=0, error=error) for name, role in (("p", "prefill"), ("d", "decode"))]
        dispatcher = dispatcher_of(*links)
        with pytest.raises(RequestRejected, match="too long"):
            await collect(dispatcher, request_of())
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_a_replay_goes_on_from_what_was_sent() -> None:
    async def run() -> None:
        links = [gang("a", faults=[Fault("error", 2, closes=True)], num_cached=1), gang("b", num_cached=3)]
        dispatcher = dispatcher_of(*reversed(links))
        chunks = await collect(dispatcher, request_of(min_tokens=3))
        check_answer(chunks, oracle())
        replay = links[1].requests[0]
        assert replay.request_id == "r/d2"
        assert list(replay.prompt_token_ids) == PROMPT + oracle(2)
        assert replay.num_replayed == 2
        assert (replay.sampling.max_tokens, replay.sampling.min_tokens, replay.sampling.seed) == (6, 3, 3)
        assert {chunk.num_cached_tokens for chunk in chunks} == {1}
        assert dispatcher.counts.retries == {"worker_lost": 1}
        assert dispatcher.counts.num_recovered == 1
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_a_replay_uses_a_pair_with_a_new_ticket() -> None:
    async def run() -> None:
        links = [
            gang("p", "prefill"),
            gang("d", "decode", step_s=0.02, faults=[Fault("error", 3, closes=True)]),
            gang("e", "decode", step_s=0.02, faults=[Fault("error", 1, closes=True)]),
            gang("f", "decode", step_s=0.02),
        ]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        tickets = [request.offer for request in links[0].requests]
        assert len(set(tickets)) == len(tickets) == dispatcher.counts.routes["joint"] > 1
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_prefill_gangs_stand_in_where_no_decode_gang_is_left() -> None:
    async def run() -> None:
        links = [gang("p", "prefill"), gang("d", "decode", faults=[Fault("error", 2, closes=True)])]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert [request.offer is None for request in links[0].requests] == [False, True]
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_a_request_waits_for_the_replacement_of_its_gang() -> None:
    async def run() -> None:
        fleet = FakeFleet(gang("a", faults=[Fault("error", 2, closes=True)]))
        dispatcher = Dispatcher(fleet, limits=Limits(ready_timeout_s=1, recovery_timeout_s=60))
        asyncio.get_running_loop().call_later(40, fleet.add, gang("a2"))
        check_answer(await collect(dispatcher, request_of()), oracle())

    run_stepped(run())


def test_without_a_replacement_the_loss_is_the_answer() -> None:
    async def run() -> None:
        links = [gang("a", faults=[Fault("error", 2, WorkerLost("rank 1 died"), closes=True)])]
        dispatcher = dispatcher_of(*links)
        with pytest.raises(WorkerLost, match="rank 1 died"):
            await collect(dispatcher, request_of())
        assert asyncio.get_running_loop().time() == pytest.approx(30, abs=1)
        assert dispatcher.counts.num_recovered == 0
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_attempts_are_bounded() -> None:
    async def run() -> None:
        link = gang("a", fail_after=0)
        dispatcher = dispatcher_of(link, limits=Limits(max_attempts=5, max_lost_in_a_row=9))
        with pytest.raises(WorkerLost):
            await collect(dispatcher, request_of())
        assert len(link.requests) == 5
        assert dispatcher.counts.retries == {"worker_lost": 4}
        assert asyncio.get_running_loop().time() > 0.5  # with pauses in between
        check_nothing_left(dispatcher, [link])

    run_stepped(run())


def test_a_request_that_kills_every_gang_is_given_up_before_all_are_gone() -> None:
    """Four gangs, not the eight that `max_attempts` would cost."""

    async def run() -> None:
        links = [gang(name, fail_after=0) for name in "abcdef"]
        dispatcher = dispatcher_of(*links)
        with pytest.raises(WorkerLost, match="4 gangs in a row were lost before the next token of this request"):
            await collect(dispatcher, request_of())
        assert sum(len(link.requests) for link in links) == 4
        assert asyncio.get_running_loop().time() == pytest.approx(0.5 + 1.0, abs=0.2)  # before the third and the fourth
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_a_request_that_goes_on_is_not_given_up() -> None:
    async def run() -> None:
        links = [gang(name, faults=[Fault("error", 1, WorkerLost("killed"))]) for name in "abcdef"]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert dispatcher.counts.retries["worker_lost"] > 4
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_the_deadline_holds_through_recovery() -> None:
    async def run() -> None:
        dispatcher = dispatcher_of(gang("a", faults=[Fault("error", 2, closes=True)]))
        chunks = await collect(dispatcher, dataclasses.replace(request_of(), deadline_s=5.0))
        assert (chunks[-1].finish_reason, chunks[-1].start) == ("timeout", 2)
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)
        with pytest.raises(DeadlineExceeded):
            await collect(dispatcher_of(gang("a", faults=[CLOSES])), dataclasses.replace(request_of(), deadline_s=5.0))

    run_stepped(run())


def test_a_full_gang_sends_a_new_request_on_and_an_old_one_waits() -> None:
    async def run() -> None:
        full = Overloaded("full", retry_after_s=1.0)
        links = [gang("a", fail_after=0, error=full), gang("b")]
        check_answer(await collect(dispatcher_of(*reversed(links)), request_of()), oracle())
        links = [gang("a", faults=[Fault("error", 2, closes=True)]), gang("b", faults=[Fault("error", 0, full)] * 12)]
        dispatcher = dispatcher_of(*reversed(links))
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert dispatcher.counts.retries == {"worker_lost": 1, "overloaded": 12}

    run_stepped(run())


def test_a_gang_that_ends_a_request_unasked_is_left() -> None:
    async def run() -> None:
        links = [gang("a", faults=[Fault("cancelled", 3)]), gang("b")]
        check_answer(await collect(dispatcher_of(*reversed(links)), request_of()), oracle())

    run_stepped(run())


def test_a_token_unlike_the_one_sent_is_computed_again() -> None:
    async def run() -> None:
        links = [gang("p", "prefill"), gang("d", "decode", step_s=0.03, faults=[Fault("wrong")])]
        dispatcher = dispatcher_of(*links)
        check_answer(await collect(dispatcher, request_of()), oracle())
        assert dispatcher.counts.retries == {"diverged": 1}
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_tokens_that_are_all_out_need_no_replay() -> None:
    """The gang died after its last token and before it said that it was the last."""

    class Unfinished(FakeLink):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
            async for chunk in super().generate(request):
                yield dataclasses.replace(chunk, finish_reason=None, stop_reason=None)
            self.is_open = False
            raise WorkerLost("gone")

    async def run() -> None:
        for spec, reason, stop in (
            (SamplingSpec(max_tokens=3), "length", None),
            (SamplingSpec(max_tokens=9, min_tokens=3, stop_token_ids=(9,)), "stop", 9),
        ):
            other = gang("b")
            link = Unfinished(INFO, gang_id="a", script=[9, 7, 9])
            request = dataclasses.replace(request_of(), sampling=spec)
            chunks = await collect(dispatcher_of(other, link), request)
            assert [token for chunk in chunks for token in chunk.token_ids] == [9, 7, 9]
            assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == (reason, stop)
            assert not other.requests

    run_stepped(run())


@pytest.mark.parametrize("num_chunks", [0, 1, 2])
def test_leaving_early_ends_both_sides(num_chunks: int) -> None:
    async def run() -> None:
        links = [gang("p", "prefill"), gang("d", "decode", step_s=0.03)]
        dispatcher = dispatcher_of(*links)
        async with aclosing(dispatcher.generate(request_of())) as chunks:
            for _ in range(num_chunks):
                await anext(chunks)
            if not num_chunks:
                waiting = asyncio.create_task(anext(chunks))
                await asyncio.sleep(0.005)
                waiting.cancel()
                await asyncio.wait((waiting,))
        assert links[1].cancelled == ["r/d1"]
        assert links[0].cancelled + links[0].released == [links[0].requests[0].request_id]
        check_nothing_left(dispatcher, links)

    run_stepped(run())


FAULTS = st.builds(
    Fault,
    st.sampled_from(["error", "cancelled", "short", "hang"]),
    st.integers(0, 7),
    st.sampled_from([None, TransferFailed("x"), NotReady("x"), Overloaded("x")]),
    st.booleans(),
)
NO_FAULT = Fault("wrong", after=99)
POLICIES = st.sampled_from(["joint", "round_robin", "power_of_two", "least_loaded"])


@settings(max_examples=300, deadline=None)
@given(
    plan=st.lists(
        st.tuples(
            st.sampled_from(["prefill", "decode", "both"]),
            st.lists(st.one_of(st.just(NO_FAULT), FAULTS), max_size=3),
            st.sampled_from([0.0, 0.01, 0.05]),
        ),
        min_size=1,
        max_size=5,
    ),
    policy=POLICIES,
    max_tokens=st.integers(1, 7),
    num_requests=st.integers(1, 4),
)
def test_any_schedule_of_faults_gives_the_same_tokens(
    plan: list[tuple[str, list[Fault], float]], policy: PolicyName, max_tokens: int, num_requests: int
) -> None:
    """As long as gangs come back. One always does, late, and never fails."""

    async def run() -> None:
        links = [
            gang(f"g{i}", role, faults=faults, step_s=step_s, gives_kv=role != "decode")
            for i, (role, faults, step_s) in enumerate(plan)
        ]
        fleet = FakeFleet(*links)
        limits = Limits(max_attempts=50, max_lost_in_a_row=50)
        policy_ = build_policy(policy, PolicySettings(min_prefill_tokens=1))
        dispatcher = Dispatcher(fleet, policy_, limits)
        late = gang("late")
        asyncio.get_running_loop().call_later(1.0, fleet.add, late)
        requests = [request_of(f"r{i}", max_tokens) for i in range(num_requests)]
        answers = await asyncio.gather(*(collect_patiently(dispatcher, request) for request in requests))
        for chunks in answers:
            assert [token for chunk in chunks for token in chunk.token_ids] == oracle(max_tokens)
            assert chunks[-1].finish_reason == "length"
        await asyncio.sleep(10)
        check_nothing_left(dispatcher, [*links, late])

    run_stepped(run())


async def collect_patiently(dispatcher: Dispatcher, request: GenerateRequest) -> list[TokenChunk]:
    """A client that comes again when it was refused before its first token."""
    while True:
        try:
            return await collect(dispatcher, request)
        except Overloaded:
            await asyncio.sleep(1.0)
