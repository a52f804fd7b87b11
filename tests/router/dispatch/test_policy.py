"""Which gangs get a request: costs computed by hand, rotation, KV space, sessions; and that speeds are learnt."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorweave.cluster.block_hash import block_hashes, root_hash
from tensorweave.cluster.protocol import GenerateRequest, KvSource, LinkMeasurement, Role, SamplingSpec
from tensorweave.router.dispatch.booking import Booking
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Assumptions, Loads
from tensorweave.router.dispatch.policy import Joint, Options, PolicyName, PolicySettings, Route, build_policy
from tensorweave.router.dispatch.speeds import SpeedLine
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.fake_fleet import FakeFleet, FakeLink
from tests.router.serving import model_info

INFO = model_info()
POLICIES: list[PolicyName] = ["joint", "least_loaded", "power_of_two", "round_robin"]
# 1 ms a token and 10 ms besides; a hand-over costs 0.1 ms a token and 20 ms besides.
LOADS = Assumptions(0.010, 0.001, 0.020, 0.0001)
SETTINGS = PolicySettings(min_prefill_tokens=50, stall_weight=0.5, decode_s=0.004)


def gang(name: str, role: Role = "both", load: int = 0) -> FakeLink:
    link = FakeLink(INFO, gang_id=name, role=role)
    link.num_inflight = load
    return link


def request_of(num_tokens: int = 200, salt: str | None = None) -> GenerateRequest:
    return GenerateRequest("r", [i % 97 for i in range(num_tokens)], SamplingSpec(max_tokens=4), cache_salt=salt)


def options_of(
    *links: FakeLink, request: GenerateRequest | None = None, loads: Loads | None = None, session: str | None = None
) -> Options:
    return Options(
        [link for link in links if link.role != "decode"],
        [link for link in links if link.role != "prefill"],
        PromptView(request or request_of()),
        loads or Loads(LOADS),
        session,
    )


def hold(link: FakeLink, request: GenerateRequest, num_tokens: int) -> None:
    """As if the gang's events had told of the prompt's first blocks."""
    size = INFO.tokens_per_block
    names = block_hashes(request.prompt_token_ids[:num_tokens], size, request.cache_salt)
    link.kv.apply(["kv", 0, 0, [["stored", root_hash(request.cache_salt), *names]]])


def ids(route: Route) -> tuple[str | None, str]:
    return (route.prefill.gang_id if route.prefill is not None else None, route.decode.gang_id)


# ---- costs


def test_the_cost_of_a_gang_alone() -> None:
    link, loads = gang("a"), Loads(LOADS)
    policy = Joint(SETTINGS)
    options = options_of(link, loads=loads)
    # 200 tokens: 10 + 200 ms, and 0.5 s of stall for each of the one that may come.
    assert policy.alone_s(link, options) == pytest.approx(0.210 + 0.5 * 0.200)
    loads.of("a").queued_tokens, loads.of("a").num_decoding = 300, 3
    # 10 + 500 ms, the stall of 3 + 1 others, and 3 to decode with.
    assert policy.alone_s(link, options) == pytest.approx(0.510 + 0.5 * 4 * 0.200 + 3 * 0.004)
    hold(link, request_of(), 128)
    assert policy.alone_s(link, options) == pytest.approx(0.010 + 0.372 + 0.5 * 4 * 0.072 + 0.012)


def test_the_cost_of_a_pair() -> None:
    sender, link, loads = gang("p", "prefill"), gang("d", "decode"), Loads(LOADS)
    policy, route = Joint(SETTINGS), Route(sender, link)
    options = options_of(sender, link, loads=loads)
    # 10 + 200 ms to compute, which stalls nobody; 20 + 20 ms to move.
    assert policy.pair_s(route, options) == pytest.approx(0.210 + 0.040)
    hold(link, request_of(), 160)
    hold(sender, request_of(), 64)
    loads.of("d").num_decoding = 2
    assert policy.pair_s(route, options) == pytest.approx(0.146 + 0.020 + 0.004 + 0.008)


def test_a_measured_link_says_what_bytes_cost() -> None:
    sender, link, loads = gang("p", "prefill"), gang("d", "decode"), Loads(LOADS)
    link.info = dataclasses.replace(INFO, kv_bytes_per_token=50_000)
    link.kv_links = {"p": LinkMeasurement(bytes_per_s=1e9, latency_s=0.001)}
    # 200 tokens are 10 MB, at 1 GB/s 10 ms; 21 ms besides.
    assert loads.handover(sender, link).seconds(200) == pytest.approx(0.021 + 0.010)
    # Of a link that was not measured, the median of the others is assumed: 20 ms here.
    link.kv_links |= {"q": LinkMeasurement(5e8, 0.001), "r": LinkMeasurement(1e8, 0.001)}
    assert loads.handover(gang("s", "prefill"), link).seconds(200) == pytest.approx(0.021 + 0.020)


@pytest.mark.parametrize(
    ("num_tokens", "cached", "expected"),
    [
        (200, 0, ("p", "d")),  # alone 310 ms, together 260 ms
        (40, 0, (None, "d")),  # too short to be looked at
        (60, 0, (None, "d")),  # alone 100 ms, together 106 ms
        (200, 160, (None, "d")),  # 40 tokens are left
    ],
)
def test_short_and_cached_prompts_skip_the_prefill_pool(
    num_tokens: int, cached: int, expected: tuple[str | None, str]
) -> None:
    sender, link = gang("p", "prefill"), gang("d", "decode")
    request = request_of(num_tokens)
    hold(link, request, cached)
    # Alone n tokens cost 10 + 1.5 n ms, together 40 + 1.1 n: equal at 75.
    loads = Loads(dataclasses.replace(LOADS, handover_fixed_s=0.030))
    assert ids(Joint(SETTINGS).route(options_of(sender, link, request=request, loads=loads))) == expected


def test_a_long_queue_is_gone_round() -> None:
    loads = Loads(LOADS)
    links = [gang("p", "prefill"), gang("q", "prefill"), gang("d", "decode"), gang("e", "decode")]
    loads.of("p").queued_tokens = 50
    loads.of("d").num_decoding = 5
    for _ in range(4):
        assert ids(Joint(SETTINGS).route(options_of(*links, loads=loads))) == ("q", "e")
    loads.of("q").queued_tokens = 2000
    loads.of("p").queued_tokens = 2000
    assert ids(Joint(SETTINGS).route(options_of(*links, loads=loads))) == (None, "e")


def test_cached_tokens_draw_a_request() -> None:
    links = [gang(name) for name in "abc"]
    hold(links[2], request_of(), 96)
    policy = Joint(SETTINGS)
    assert {ids(policy.route(options_of(*links))) for _ in range(6)} == {(None, "c")}
    salted = request_of(salt="other")
    routes = {ids(policy.route(options_of(*links, request=salted))) for _ in range(6)}
    assert routes == {(None, "a"), (None, "b"), (None, "c")}


def test_a_gang_without_room_is_the_last_resort() -> None:
    links, loads = [gang("a"), gang("b")], Loads(LOADS)
    room = INFO.num_blocks * INFO.tokens_per_block
    loads.of("a").kv_tokens = room - 200 - SETTINGS.reserve_tokens + 1
    loads.of("b").num_decoding = 50
    policy = Joint(SETTINGS)
    assert ids(policy.route(options_of(*links, loads=loads))) == (None, "b")
    loads.of("b").kv_tokens = room
    assert ids(policy.route(options_of(*links, loads=loads))) == (None, "a")


def test_a_session_stays_where_that_costs_nothing() -> None:
    links, loads, policy = [gang(name) for name in "abcd"], Loads(LOADS), Joint(SETTINGS)
    first = ids(policy.route(options_of(*links, loads=loads, session="s")))
    for _ in range(5):
        assert ids(policy.route(options_of(*links, loads=loads))) is not None
        assert ids(policy.route(options_of(*links, loads=loads, session="s"))) == first
    loads.of(first[1]).queued_tokens = 100
    moved = ids(policy.route(options_of(*links, loads=loads, session="s")))
    assert moved != first
    loads.of(first[1]).queued_tokens = 0
    assert ids(policy.route(options_of(*links, loads=loads, session="s"))) == moved


def test_kv_that_does_not_fit_is_not_handed_over() -> None:
    sender, link = gang("p", "prefill"), gang("d", "decode")
    link.kv_source = KvSource("d", (), {"model": "m"}, "s")
    assert ids(Joint(SETTINGS).route(options_of(sender, link))) == ("p", "d")
    link.kv_source = KvSource("d", (), {"model": "another"}, "s")
    sender.kv_source = KvSource("p", (), {"model": "m"}, "s")
    for name in POLICIES:
        assert ids(build_policy(name, SETTINGS).route(options_of(sender, link))) == (None, "d")


def test_many_gangs_are_routed_from_a_short_list() -> None:
    loads = Loads(LOADS)
    links = [gang(f"p{i}", "prefill") for i in range(40)] + [gang(f"d{i}", "decode") for i in range(40)]
    for i in range(40):
        loads.of(f"p{i}").queued_tokens = 1000 - 10 * i
        loads.of(f"d{i}").num_decoding = 100 - i
    assert ids(Joint(SETTINGS).route(options_of(*links, loads=loads))) == ("p39", "d39")


def test_of_hundreds_of_gangs_all_are_used_and_those_that_hold_the_prompt_are_found() -> None:
    loads, policy = Loads(LOADS), Joint(SETTINGS)
    links = [gang(f"g{i}") for i in range(300)]
    used = collections.Counter[str]()
    for _ in range(600):
        route = policy.route(options_of(*links, loads=loads))
        loads.of(route.decode.gang_id).num_decoding += 1
        used[route.decode.gang_id] += 1
    assert len(used) == 300
    assert max(used.values()) <= 4
    hold(links[123], request_of(), 160)
    routes = {ids(policy.route(options_of(*links, loads=loads))) for _ in range(10)}
    assert routes == {(None, "g123")}


def test_of_hundreds_of_full_gangs_the_one_with_room_and_the_session_s_own_are_found() -> None:
    loads, policy = Loads(LOADS), Joint(SETTINGS)
    links = [gang(f"g{i}") for i in range(300)]
    first = ids(policy.route(options_of(*links, loads=loads, session="s")))
    assert {ids(policy.route(options_of(*links, loads=loads, session="s"))) for _ in range(10)} == {first}
    for link in links:
        loads.of(link.gang_id).kv_tokens = INFO.num_blocks * INFO.tokens_per_block
    loads.of("g200").kv_tokens = 0
    assert {ids(policy.route(options_of(*links, loads=loads))) for _ in range(10)} == {(None, "g200")}


@given(depths=st.lists(st.integers(0, 12), min_size=1, max_size=40), most=st.integers(1, 8))
def test_holders_hold_no_less_than_others(depths: list[int], most: int) -> None:
    request = request_of(12 * INFO.tokens_per_block + 5)
    links = [gang(str(i)) for i in range(len(depths))]
    for link, depth in zip(links, depths, strict=True):
        hold(link, request, depth * INFO.tokens_per_block)
    held = sorted((depths[int(link.gang_id)] for link in PromptView(request).holders(links, most)), reverse=True)
    best = sorted((depth for depth in depths if depth), reverse=True)
    if len(best) <= most:
        assert held == best
    else:
        assert best[0] in held or len(held) == most
        assert 0 < len(held) <= most


# ---- simple rules


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_pairs_long_prompts_and_not_short_ones(name: PolicyName) -> None:
    links = [gang("p", "prefill"), gang("q", "prefill"), gang("d", "decode"), gang("e", "decode")]
    policy = build_policy(name, SETTINGS, random.Random(1))
    routes = {ids(policy.route(options_of(*links))) for _ in range(64)}
    assert {p for p, _ in routes} == {"p", "q"}
    assert {d for _, d in routes} == {"d", "e"}
    short = request_of(20)
    assert {ids(policy.route(options_of(*links, request=short)))[0] for _ in range(8)} == {None}


@pytest.mark.parametrize("name", POLICIES)
def test_gangs_of_role_both_answer_alone_and_evenly(name: PolicyName) -> None:
    async def run() -> list[int]:
        links = [FakeLink(INFO, gang_id=f"gang-{i}", step_s=0.001) for i in range(3)]
        dispatcher = Dispatcher(FakeFleet(*links), build_policy(name, SETTINGS, random.Random(1)))

        async def ask(i: int) -> None:
            async for chunk in dispatcher.generate(dataclasses.replace(request_of(), request_id=f"r{i}")):
                assert chunk.error is None

        await asyncio.gather(*(ask(i) for i in range(30)))
        assert dispatcher.counts.routes == {"alone": 30}
        return [len(link.requests) for link in links]

    counts = run_stepped(run())
    assert sum(counts) == 30
    assert min(counts) >= 3


def test_round_robin_takes_turns() -> None:
    policy, links = build_policy("round_robin"), [gang("a"), gang("b", load=9), gang("c")]
    chosen = [ids(policy.route(options_of(*links)))[1] for _ in range(6)]
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == ["a", "b", "c"]


def test_least_loaded_spreads_ties() -> None:
    policy = build_policy("least_loaded")
    uneven = [gang("a", load=3), gang("b", load=1), gang("c", load=2)]
    assert ids(policy.route(options_of(*uneven))) == (None, "b")
    even = [gang(name) for name in "abc"]
    assert {ids(policy.route(options_of(*even)))[1] for _ in range(3)} == {"a", "b", "c"}


def test_power_of_two_never_takes_the_worst() -> None:
    policy = build_policy("power_of_two", draw=random.Random(5))
    links = [gang("a", load=5), gang("b", load=1), gang("c", load=3)]
    assert {ids(policy.route(options_of(*links)))[1] for _ in range(100)} == {"b", "c"}
    assert ids(policy.route(options_of(links[0]))) == (None, "a")


# ---- speeds and bookings


@given(
    fixed_s=st.floats(0, 0.1),
    per_token_s=st.floats(1e-6, 1e-2),
    tokens=st.lists(st.integers(1, 8000), min_size=60, max_size=80),
)
def test_a_line_learns_what_it_sees(fixed_s: float, per_token_s: float, tokens: list[int]) -> None:
    line = SpeedLine(0.005, 1e-4)
    for num_tokens in tokens:
        line.add(num_tokens, fixed_s + per_token_s * num_tokens)
    assert line.per_token_s >= 0
    assert line.fixed_s >= 0
    seen = tokens[-20:]
    for num_tokens in (min(seen), max(seen)):
        true_s = fixed_s + per_token_s * num_tokens
        assert line.seconds(num_tokens) == pytest.approx(true_s, rel=0.5, abs=0.15 * (0.1 + per_token_s * 1024))


def test_a_line_starts_as_assumed() -> None:
    line = SpeedLine(0.01, 0.001)
    assert line.seconds(100) == pytest.approx(0.11)
    line.add(100, 0.11)
    assert line.seconds(100) == pytest.approx(0.11)
    for _ in range(100):
        line.add(1000, 0.2)
    assert line.seconds(1000) == pytest.approx(0.2, rel=0.25)


def test_a_booking_gives_back_what_it_took_and_teaches_speeds() -> None:
    loads, sender, link = Loads(LOADS), gang("p", "prefill"), gang("d", "decode")
    fields = {"num_prefill": 200, "num_moved": 160, "num_prompt": 200, "num_reserved": 4}
    booking = Booking(loads, prefill=sender, decode=link, now_s=0.0, **fields)
    assert (loads.of("p").queued_tokens, loads.of("d").num_decoding, loads.of("d").kv_tokens) == (200, 1, 204)
    before = loads.of("p").prefill.seconds(200), loads.handover(sender, link).seconds(160)
    booking.prefilled(0, now_s=1.0)
    assert (loads.of("p").queued_tokens, loads.of("d").num_decoding) == (0, 1)
    booking.handed_over(now_s=2.0)
    assert loads.of("p").prefill.seconds(200) > before[0]
    assert loads.handover(sender, link).seconds(160) > before[1]
    booking.close()
    assert loads.of("p").is_idle
    assert loads.of("d").is_idle
    loads.keep_only(["d"])
    assert loads.of("p").prefill.seconds(200) == before[0]
