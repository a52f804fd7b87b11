"""The two phases sent by hand over HTTP, and requests that are picked up again after their router was lost."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tensorweave.cluster.errors import Overloaded, WorkerLost
from tensorweave.cluster.opaque_state import OpaqueState
from tensorweave.cluster.protocol import GenerateRequest, KvSource, Ticket, TokenChunk
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher, Handoff
from tensorweave.router.http.app import build_app
from tensorweave.router.openai.disaggregated import DisaggregatedParams, params_of
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.dispatch.test_recovery import (
    INFO,
    check_answer,
    check_nothing_left,
    collect,
    gang,
    oracle,
    request_of,
)
from tests.router.fake_fleet import FakeFleet, FakeLink, Fault, hash_token
from tests.router.serving import chat, client_of, completion, events_of, make_app, make_service, model_info

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SOURCE = KvSource("elsewhere", (), {"model": "m"}, "secret")


def pools(**options: Any) -> list[FakeLink]:
    return [
        FakeLink(model_info(), gang_id="p", role="prefill", **options),
        FakeLink(model_info(), gang_id="d", role="decode"),
    ]


def post(path: str, body: Any, links: Sequence[FakeLink], **kwargs: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        async with client_of(make_app(*links)) as client:
            return await client.post(path, json=body, **kwargs)

    return asyncio.run(call())


# ---- over HTTP


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_two_phases_by_hand_equal_one_request(path: str, stream: bool) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0.5}
    body = chat(**fields) if path == CHAT else completion("Hello there", **fields)
    context = {"request_type": "context_only", "disagg_request_id": 77}
    first = post(path, {**body, "disaggregated_params": context}, pools(num_cached=1)).json()
    [choice] = first["choices"]
    assert choice["finish_reason"] == "not_finished"
    assert first["usage"]["completion_tokens"] == 1
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert choice["disaggregated_params"]["request_type"] == "context_only"

    handed = {**choice["disaggregated_params"], "request_type": "generation_only"}
    given = {"prompt_token_ids": first["prompt_token_ids"]} if path == CHAT else {"prompt": first["prompt_token_ids"]}
    links = pools()
    answer = post(path, {**body, **given, "disaggregated_params": handed, "stream": stream}, links)
    assert not links[0].requests
    [asked] = links[1].requests
    assert asked.fetch is not None
    assert asked.fetch.source.gang_id == "p"
    assert list(asked.prompt_token_ids) == first["prompt_token_ids"]

    seeded = {**body, **given, "seed": asked.sampling.seed, "stream": stream}
    whole = post(path, seeded, [FakeLink(model_info())])
    if stream:
        assert [text_of(event) for event in events_of(answer.text)[:-1]] == [
            text_of(event) for event in events_of(whole.text)[:-1]
        ]
    else:
        assert answer.json()["choices"] == whole.json()["choices"]
        assert answer.json()["usage"]["completion_tokens"] == 12


def text_of(event: dict[str, Any]) -> Any:
    [choice] = event["choices"]
    return choice.get("text") or choice.get("delta")


def test_a_context_phase_that_ends_the_request_says_so() -> None:
    context = {"request_type": "context_only"}
    answer = post(COMPLETIONS, completion("Hi", max_tokens=1, disaggregated_params=context), pools()).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["disaggregated_params"] is None


def handed_params(**changes: Any) -> dict[str, Any]:
    params = params_of(Ticket("0" * 32, SOURCE), [5], 3).model_dump(exclude_none=True)
    return {**params, "request_type": "generation_only", **changes}


def test_both_phases_cap_what_there_is_no_room_for() -> None:
    body = completion([5] * 500, max_tokens=10_000, ignore_eos=True)
    first = post(COMPLETIONS, {**body, "disaggregated_params": {"request_type": "context_only"}}, pools()).json()
    handed = {**first["choices"][0]["disaggregated_params"], "request_type": "generation_only"}
    answer = post(COMPLETIONS, {**body, "disaggregated_params": handed}, pools()).json()
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"disaggregated_params": {"request_type": "context_only"}, "n": 2}, "n"),
        ({"disaggregated_params": {"request_type": "context_only"}, "stream": True}, "stream"),
        ({"disaggregated_params": {"request_type": "context_only"}, "prompt": ["a", "b"]}, "prompt"),
        ({"disaggregated_params": {"request_type": "sideways"}}, "disaggregated_params.request_type"),
        ({"disaggregated_params": {"request_type": "context_only", "x": 1}}, "disaggregated_params.x"),
        ({"disaggregated_params": handed_params()}, "prompt"),
        ({"disaggregated_params": handed_params(first_gen_tokens=None)}, "disaggregated_params.first_gen_tokens"),
        ({"disaggregated_params": handed_params(first_gen_tokens=[10**6])}, "disaggregated_params.first_gen_tokens"),
        (
            {"disaggregated_params": handed_params(encoded_opaque_state=None)},
            "disaggregated_params.encoded_opaque_state",
        ),
        (
            {"disaggregated_params": handed_params(encoded_opaque_state="AAAA")},
            "disaggregated_params.encoded_opaque_state",
        ),
        (
            {"disaggregated_params": handed_params(encoded_opaque_state="not base64!")},
            "disaggregated_params.encoded_opaque_state",
        ),
        ({"disaggregated_params": handed_params(draft_tokens=[4])}, "disaggregated_params.draft_tokens"),
    ],
)
def test_wrong_phases_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    is_about_params = param.startswith("disaggregated_params.") and "encoded" not in param
    prompt = [5, 6] if param != "prompt" and (is_about_params or "encoded" in param) else "Hi"
    answer = post(COMPLETIONS, {**completion(prompt), **fields}, pools())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_service_without_kv_to_give_refuses_the_context_phase() -> None:
    body = completion("Hi", disaggregated_params={"request_type": "context_only"})
    answer = post(COMPLETIONS, body, [FakeLink(model_info())])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "disaggregated_params")


def test_the_state_survives_its_way_through_json() -> None:
    ticket = Ticket("ab" * 16, SOURCE)
    params = DisaggregatedParams.model_validate_json(params_of(ticket, [7], 2**62).model_dump_json())
    assert params.handed_over(100) == (OpaqueState(ticket, 2**62), [7])


# ---- the dispatcher's side


def test_a_lost_prefill_gang_is_replaced_by_another_with_another_ticket() -> None:
    async def run() -> Handoff:
        links = [gang("p", "prefill", faults=[Fault("error", closes=True)]), gang("q", "prefill"), gang("d", "decode")]
        dispatcher = Dispatcher(FakeFleet(*reversed(links)))
        handoff = await dispatcher.prefill(request_of())
        assert list(handoff.chunk.token_ids) == oracle(1)
        assert handoff.ticket is not None
        assert handoff.ticket.source.gang_id == "q"
        [asked] = links[1].requests
        assert asked.offer == handoff.ticket.ticket_id
        assert not links[1].released  # the lease is the ticket holder's
        assert not links[2].requests
        assert dispatcher.num_running == 0
        return handoff

    run_stepped(run())


def test_refusals_and_losses_of_a_context_phase_are_its_answer() -> None:
    async def run() -> None:
        for error in (Overloaded("full"), WorkerLost("gone")):
            dispatcher = Dispatcher(FakeFleet(gang("p", "prefill", fail_after=0, error=error)))
            with pytest.raises(type(error)):
                await dispatcher.prefill(request_of())
            assert dispatcher.num_running == 0

    run_stepped(run())


def test_a_generation_phase_tells_the_first_token_and_recovers() -> None:
    async def run() -> None:
        links = [gang("d", "decode", faults=[Fault("error", 3, closes=True)]), gang("e", "decode")]
        dispatcher = Dispatcher(FakeFleet(*reversed(links)))
        request = dataclasses.replace(request_of(), fetch=Ticket("t", SOURCE))
        chunks = [chunk async for chunk in dispatcher.generate(request, first_tokens=oracle(1))]
        check_answer(chunks, oracle())
        assert list(chunks[0].token_ids) == oracle(1)
        assert [link.requests[0].fetch is None for link in links] == [False, True]
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_a_generation_phase_keeps_to_the_token_it_was_given() -> None:
    """Should the gang compute another first token than the client was told, it goes on from the client's."""

    async def run() -> None:
        told = oracle(1)[0] ^ 1
        link = gang("d", "decode")
        request = dataclasses.replace(request_of(max_tokens=3), fetch=Ticket("t", SOURCE))
        chunks = [c async for c in Dispatcher(FakeFleet(link)).generate(request, first_tokens=[told])]
        tokens = [5, 6, 7, told]
        while len(tokens) < 6:
            tokens.append(hash_token(tokens, 3, INFO))
        check_answer(chunks, tokens[3:])

    run_stepped(run())


def test_a_generation_phase_with_nothing_left_ends_at_once() -> None:
    async def run() -> None:
        link = gang("d", "decode")
        request = dataclasses.replace(request_of(max_tokens=1), fetch=Ticket("t", SOURCE))
        chunks = [c async for c in Dispatcher(FakeFleet(link)).generate(request, first_tokens=[9])]
        assert [(list(c.token_ids), c.finish_reason) for c in chunks] == [([9], None), ([], "length")]
        assert not link.requests

    run_stepped(run())


# ---- a request that its client asks for again


def named(name: str = "r") -> GenerateRequest:
    return dataclasses.replace(request_of(name), grace_s=10.0)


def test_a_request_that_runs_somewhere_is_picked_up() -> None:
    async def run() -> None:
        links = [gang("a"), gang("b", step_s=0.01), gang("p", "prefill")]
        tokens = oracle()
        links[1].begun["r"] = [
            TokenChunk("r", tokens[:4]),
            TokenChunk("r", tokens[4:5], start=4),
            TokenChunk("r", tokens[5:], "length", start=5),
        ]
        dispatcher = Dispatcher(FakeFleet(*links))
        check_answer(await collect(dispatcher, named()), tokens)
        assert links[1].attached == ["r"]
        assert not any(link.requests for link in links)
        assert dispatcher.counts.num_reattached == 1
        assert not dispatcher.counts.retries
        check_nothing_left(dispatcher, links)

    run_stepped(run())


def test_one_that_is_gone_when_asked_for_is_begun_anew() -> None:
    async def run() -> None:
        link = gang("a")
        link.begun["r"] = []
        link.attach_fails = True
        dispatcher = Dispatcher(FakeFleet(link))
        check_answer(await collect(dispatcher, named()), oracle())
        assert len(link.requests) == 1

    run_stepped(run())


def test_a_gang_lost_while_it_was_picked_up_is_replayed() -> None:
    async def run() -> None:
        links = [gang("a"), gang("b")]
        links[1].begun["r"] = [TokenChunk("r", oracle()[:4])]  # and then its stream just ends
        links[1].begun_seed = named().sampling.seed
        dispatcher = Dispatcher(FakeFleet(*links))
        check_answer(await collect(dispatcher, named()), oracle())
        assert list(links[0].requests[0].prompt_token_ids) == [5, 6, 7, *oracle()[:4]]

    run_stepped(run())


@pytest.mark.parametrize(("num_told", "seed"), [(4, 77), (0, 3)])
def test_what_goes_on_elsewhere_keeps_the_seed_of_what_was_told(num_told: int, seed: int) -> None:
    """The seed that the lost router drew, once a token of its attempt has been told; else the request's own."""

    async def run() -> None:
        links = [gang("a"), gang("b")]
        links[1].begun["r"] = [TokenChunk("r", oracle()[:num_told])] if num_told else []
        links[1].begun_seed = 77
        dispatcher = Dispatcher(FakeFleet(*links))
        await collect(dispatcher, named())
        [went_on] = links[0].requests
        assert (went_on.sampling.seed, went_on.num_replayed) == (seed, num_told)
        assert named().sampling.seed == 3

    run_stepped(run())


def test_a_deadline_of_the_first_time_does_not_end_the_second() -> None:
    async def run() -> None:
        links = [gang("a"), gang("b")]
        links[1].begun["r"] = [TokenChunk("r", oracle()[:4]), TokenChunk("r", finish_reason="timeout", start=4)]
        links[1].begun_seed = named().sampling.seed
        dispatcher = Dispatcher(FakeFleet(*links))
        check_answer(await collect(dispatcher, named()), oracle())
        assert not links[1].requests

    run_stepped(run())


def test_requests_of_one_name_at_one_time_run_beside_each_other() -> None:
    """As from a proxy that gives its trace id to all: at one router, and at two."""

    async def run() -> None:
        link = gang("a", step_s=0.01)
        fleet = FakeFleet(link)
        one, other = Dispatcher(fleet), Dispatcher(fleet)
        seeded = [
            dataclasses.replace(named(), sampling=dataclasses.replace(named().sampling, seed=n)) for n in range(4)
        ]
        asked = [collect(by, request) for by, request in zip((one, one, other, other), seeded, strict=True)]
        answers = await asyncio.gather(*asked)
        for request, chunks in zip(seeded, answers, strict=True):
            context = [*request.prompt_token_ids]
            for chunk in chunks:
                assert list(chunk.token_ids) == [hash_token(context, request.sampling.seed, INFO)]
                context += chunk.token_ids
        names = {request.request_id for request in link.requests}
        assert len(names) == 4
        assert {name.rpartition("/")[0] for name in names} == {"r"}
        check_nothing_left(one, [link])

    run_stepped(run())


def name_of(request: GenerateRequest) -> str:
    """What another router looks for it by."""
    return request.request_id.rpartition("/")[0]


def test_sequences_of_one_request_have_names_and_seeds_of_their_own() -> None:
    def ask(body: dict[str, Any]) -> list[GenerateRequest]:
        link = FakeLink(model_info())
        assert post(COMPLETIONS, body, [link], headers={"x-request-id": "trace"}).status_code == 200
        return sorted(link.requests, key=lambda request: request.request_id)

    body = completion(["Hi", "Hi"], temperature=1.0, n=2)
    first, again = ask(body), ask(body)
    assert [name_of(request) for request in first] == [name_of(request) for request in again]
    assert len({name_of(request) for request in first}) == 4
    assert len({request.sampling.seed for request in [*first, *again]}) == 8
    seeded = ask({**body, "seed": 11})
    assert sorted(request.sampling.seed for request in seeded) == [11, 11, 12, 12]


def test_the_clients_own_id_names_the_same_request_and_no_other() -> None:
    def ask(body: dict[str, Any], request_id: str | None) -> GenerateRequest:
        link = FakeLink(model_info())
        headers = {} if request_id is None else {"x-request-id": request_id}
        assert post(COMPLETIONS, body, [link], headers=headers).status_code == 200
        return dataclasses.replace(link.requests[0], deadline_s=None)

    body = completion("Hi", temperature=1.0)
    first, again = ask(body, "job/7"), ask(body, "job/7")
    assert first.grace_s == Limits().reattach_grace_s
    assert first.request_id.count("/") == 1  # before the attempt's own name
    assert name_of(first) == name_of(again)
    assert first.request_id != again.request_id
    assert first.sampling.seed != again.sampling.seed, "it was asked for without a seed"
    others = [completion("Ho", temperature=1.0), {**body, "seed": 5}, {**body, "seed": 0}, {**body, "top_p": 0.5}]
    others += [{**body, "cache_salt": "s"}]
    names = [name_of(ask(each, "job/7")) for each in others]
    assert len({name_of(first), *names, name_of(ask(body, "job/8"))}) == 7
    assert names[1] == name_of(ask(others[1], "job/7"))
    unnamed = [ask(body, None), ask(body, None)]
    assert len({request.request_id for request in unnamed}) == len({r.sampling.seed for r in unnamed}) == 2
    assert {request.grace_s for request in unnamed} == {0.0}


def test_sessions_come_from_the_body() -> None:
    async def run() -> None:
        sessions = []

        class Watching(Dispatcher):
            def generate(self, request: GenerateRequest, **options: Any) -> Any:
                sessions.append(options["session"])
                return super().generate(request, **options)

        service = make_service(FakeLink(model_info()))
        service.dispatcher = Watching(service.fleet)
        async with client_of(build_app(service)) as client:
            for fields in ({}, {"user": "u"}, {"user": "u", "prompt_cache_key": "k"}, {"user": 5}):
                answer = await client.post(COMPLETIONS, json=completion("Hi", **fields))
                assert answer.status_code == 200
        assert sessions == [None, "u", "k", None]

    asyncio.run(run())


def test_tickets_are_refused_unless_the_service_trusts_its_clients() -> None:
    links = pools()

    async def call() -> httpx.Response:
        async with client_of(build_app(make_service(*links, accepts_phases=False))) as client:
            phase = {"request_type": "context_only"}
            return await client.post(COMPLETIONS, json={**completion("x"), "disaggregated_params": phase})

    answer = asyncio.run(call())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "disaggregated_params"
    assert [link.num_inflight for link in links] == [0, 0]
