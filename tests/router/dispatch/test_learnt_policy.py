"""What is learnt from tokens on a stepped clock, and that the learnt policy keeps up with the better fixed one."""

from __future__ import annotations

import pytest

from tensorweave.cluster.protocol import Role
from tensorweave.router.dispatch.booking import Booking
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Assumptions, Loads
from tensorweave.router.dispatch.policy import Joint, Options, PolicySettings
from tensorweave.router.dispatch.speeds import Mean, Rate
from tests.router.dispatch.simulated_gangs import ITL_S, TTFT_S, Fixed, Speed, goodput, mixed_load
from tests.router.dispatch.test_policy import gang, request_of

SETTINGS = PolicySettings(ttft_limit_s=TTFT_S, itl_limit_s=ITL_S)
TOGETHER: tuple[Role, Role] = ("both", "both")
APART: tuple[Role, Role] = ("prefill", "decode")


def book(loads: Loads, name: str, num_tokens: int, now_s: float) -> Booking:
    return Booking(
        loads, prefill=None, decode=gang(name), num_prefill=num_tokens, num_moved=0, num_prompt=num_tokens,
        num_reserved=0, now_s=now_s,
    )  # fmt: skip


def stream(bookings: list[Booking], start_s: float, end_s: float, interval_s: float) -> float:
    """Tokens of all of them, at this interval; return the time of the last."""
    now_s = start_s
    while (now_s := now_s + interval_s) <= end_s:
        for booking in bookings:
            booking.told(1, now_s)
    return now_s - interval_s


def test_the_interval_between_tokens_is_learnt_by_how_many_decode() -> None:
    loads = Loads()
    bookings = [book(loads, "a", 10, 0.0) for _ in range(8)]
    for booking in bookings:
        booking.prefilled(0, 0.1)
    now_s = stream(bookings[:4], 0.1, 4.0, 0.02)
    for booking in bookings[4:]:
        booking.close()
    stream(bookings[:4], now_s, 8.0, 0.012)
    load = loads.of("a")
    assert (load.num_streaming, load.num_decoding) == (4, 4)
    assert load.interval.seconds(4) == pytest.approx(0.012, rel=0.1)
    for booking in bookings[:4]:
        booking.close()
    assert load.is_idle
    assert load.num_streaming == load.num_prompts == 0
    assert 130 < load.answer_tokens.value < 300, "of samples of 195 and more, from 128 on"


def test_what_a_long_prompt_costs_those_that_decode_beside_it_is_learnt() -> None:
    loads, load = Loads(Assumptions(stall_share=0.5)), None
    bookings = [book(loads, "a", 10, 0.0) for _ in range(4)]
    for booking in bookings:
        booking.prefilled(0, 0.1)
    now_s, load = stream(bookings, 0.1, 2.0, 0.01), loads.of("a")
    for _ in range(40):  # a prompt takes 400 ms, and the others get a token every 40 ms instead of 10: 300 ms lost
        prompt = book(loads, "a", 4000, now_s)
        now_s = stream(bookings, now_s, now_s + 0.4001, 0.04)
        prompt.prefilled(0, now_s)
        prompt.close()
        now_s = stream(bookings, now_s, now_s + 0.5, 0.01)
    assert load.prefill.seconds(4000) == pytest.approx(0.4, rel=0.1)
    assert load.interval.seconds(4) == pytest.approx(0.01, rel=0.1)
    assert load.stall_share.value == pytest.approx(0.75, rel=0.15)
    assert load.slow_interval.value == pytest.approx(0.04, rel=0.1)
    assert load.interval_beside_s(4000) == pytest.approx(0.04, rel=0.1)
    assert load.interval_beside_s(50) < 0.02, "a short prompt is over in one step"
    assert load.is_hit_share(now_s) > 0.05


def test_short_prompts_do_not_tell_what_long_ones_cost() -> None:
    """However many of them wait together."""
    loads = Loads()
    bookings = [book(loads, "a", 10, 0.0) for _ in range(4)]
    for booking in bookings:
        booking.prefilled(0, 0.1)
    load = loads.of("a")
    load.slow_interval = Mean(0.05)
    short = [book(loads, "a", 200, 0.1) for _ in range(6)]
    assert load.queued_tokens == 1200
    now_s = stream(bookings, 0.1, 3.0, 0.012)
    assert load.slow_interval.value == 0.05
    book(loads, "a", 1200, now_s)
    assert load.num_long_prompts == 1
    stream(bookings, now_s, now_s + 3.0, 0.012)
    assert load.slow_interval.value < 0.045
    for booking in short:
        booking.close()
    assert load.num_long_prompts == 1


@pytest.mark.parametrize(("slow_s", "chosen"), [(0.026, "g0"), (0.0285, "g1")])
def test_what_comes_near_to_the_limit_counts_as_beyond_it(slow_s: float, chosen: str) -> None:
    """The mean is learnt; every other time is above it."""
    loads = Loads(Assumptions(prefill_per_token_s=1e-5))
    for name in ("g0", "g1") * 3:
        book(loads, name, 10, 0.0)
    loads.of("g1").queued_tokens += 2000
    loads.of("g0").slow_interval = Mean(slow_s)
    options = Options([], [gang("g0"), gang("g1")], PromptView(request_of(3000)), loads)
    assert Joint(SETTINGS).route(options).decode.gang_id == chosen


def test_a_gang_where_long_prompts_make_tokens_late_is_spared() -> None:
    loads = Loads()
    decoding = [book(loads, "b", 10, 0.0) for _ in range(3)]
    loads.of("b").slow_interval = Mean(0.2)
    links, request = [gang("a"), gang("b")], request_of(3000)
    options = Options([], links, PromptView(request), loads)
    policy, alone = Joint(SETTINGS), Joint(PolicySettings(stall_weight=0.0, decode_s=0.0))
    assert policy.alone_s(links[1], options) - alone.alone_s(links[1], options) >= 3 * SETTINGS.miss_s
    assert policy.route(options).decode.gang_id == "a"
    for booking in decoding:
        booking.close()
    assert policy.alone_s(links[1], options) == pytest.approx(Joint().alone_s(links[1], options))


def test_a_queue_that_misses_the_limit_of_the_first_token_is_gone_round() -> None:
    loads, links = Loads(Assumptions(prefill_per_token_s=1e-4)), [gang("a"), gang("b")]
    loads.of("a").queued_tokens = 11_000
    options = Options([], links, PromptView(request_of(100)), loads)
    late_s = Joint(SETTINGS).alone_s(links[0], options) - Joint().alone_s(links[0], options)
    assert late_s == pytest.approx(SETTINGS.miss_s)


def test_a_rate_fades() -> None:
    rate = Rate()
    for second in range(100):
        rate.add(float(second))
    assert rate.per_s(100.0) == pytest.approx(1.0, rel=0.1)
    assert rate.per_s(190.0) < 0.06


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("chunk", "roles", "chats_per_s", "burst", "every_s", "long"),
    [
        (2048, TOGETHER, 10, 8, 4, 4000),  # the first gang should compute all long prompts: handing over is better
        (512, TOGETHER, 25, 16, 4, 4000),  # chunks keep the limit: each gang alone is better
        (1024, TOGETHER, 45, 8, 1, 4000),  # chunks of which some are within the limit and some not
        (512, TOGETHER, 40, 0, 1, 1),
        (512, APART, 25, 16, 4, 4000),
        (2048, APART, 40, 6, 2, 8000),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_learnt_policy_keeps_up_with_the_better_fixed_one(
    chunk: int, roles: tuple[Role, Role], chats_per_s: float, burst: int, every_s: float, long: int, seed: int
) -> None:
    arrivals = mixed_load(seed, chats_per_s=chats_per_s, burst_every_s=every_s, burst=burst, long=long, duration_s=50.0)
    shares = [
        goodput(policy, roles, Speed(chunk=chunk), arrivals, learns_s=20.0)
        for policy in (Joint(SETTINGS), Fixed(hands_over=True), Fixed(hands_over=False))
    ]
    print(f"learnt {shares[0]:.3f}, handed over {shares[1]:.3f}, alone {shares[2]:.3f}")
    assert shares[0] >= 0.95 * max(shares[1:])
