"""Who is admitted when: shares of keys, tokens, expectations and deadlines, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tensorweave.cluster.errors import DeadlineExceeded, Overloaded
from tensorweave.router.dispatch.admission import Admission, Limits
from tensorweave.router.dispatch.estimates import DrainRate, FirstTokenTime, InflightLimit
from tensorweave.router.dispatch.fair_queue import NO_KEY, Claim
from tensorweave.workers.fakes.stepped_loop import run_stepped

NEVER_S = 1e6


def claim(key: str = NO_KEY, num_prompt: int = 100, max_output: int = 10, timeout_s: float = NEVER_S) -> Claim:
    return Claim(key, num_prompt, max_output, timeout_s)


def stepped(body: Callable[[Callable[[], float]], Coroutine[Any, Any, None]]) -> None:
    """Run the test on a stepped loop and give it the loop's clock."""

    async def run() -> None:
        await body(asyncio.get_running_loop().time)

    run_stepped(run())


class Client:
    """Requests that hold their places for `service_s`, and what became of them."""

    def __init__(self, admission: Admission, now_s: Callable[[], float], service_s: float = 1.0) -> None:
        self.admission = admission
        self.waits_s: list[float] = []
        self.order: list[str] = []
        self.refusals: list[Overloaded | DeadlineExceeded] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._now_s = now_s
        self._service_s = service_s

    def ask(self, asked: Claim) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(asked))
        self.tasks.append(task)
        return task

    async def _run(self, asked: Claim) -> None:
        began_s = self._now_s()
        try:
            async with self.admission.place(asked) as place:
                self.waits_s.append(self._now_s() - began_s)
                self.order.append(asked.key)
                await asyncio.sleep(self._service_s / 2)
                place.tell(asked.max_output)
                await asyncio.sleep(self._service_s / 2)
        except (Overloaded, DeadlineExceeded) as error:
            self.refusals.append(error)

    async def settle(self) -> None:
        await asyncio.gather(*self.tasks)
        self.tasks.clear()
        assert (self.admission.num_running, self.admission.num_waiting) == (0, 0)
        assert (self.admission.running_tokens, self.admission.waiting_tokens) == (0.0, 0.0)


def test_a_key_that_floods_does_not_delay_another() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(Limits(max_inflight=2, max_queued=1000, queue_timeout_s=NEVER_S), now_s)
        flood, other = Client(admission, now_s), Client(admission, now_s)
        for _ in range(200):
            flood.ask(claim("flood"))
        await asyncio.sleep(10.25)
        for _ in range(5):
            await other.ask(claim("other"))
        assert max(other.waits_s) <= 1.0, "longer than until the next place was free"
        await flood.settle()
        assert not flood.refusals

    stepped(run)


def test_shares_follow_the_weights() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(
            Limits(max_inflight=1, max_queued=1000, queue_timeout_s=NEVER_S, key_weights={"b": 3.0}), now_s
        )
        client = Client(admission, now_s)
        for i in range(200):
            client.ask(claim("ab"[i % 2]))
        await asyncio.sleep(80.5)
        assert client.order.count("b") == pytest.approx(3 * client.order.count("a"), abs=3)
        await client.settle()

    stepped(run)


def test_shares_are_of_tokens_not_of_requests() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(Limits(max_inflight=1, max_queued=1000, queue_timeout_s=NEVER_S), now_s)
        client = Client(admission, now_s)
        for _ in range(100):
            client.ask(claim("long", num_prompt=990))
            client.ask(claim("short", num_prompt=90))
        await asyncio.sleep(55.5)
        assert client.order.count("short") == pytest.approx(10 * client.order.count("long"), abs=12)
        await client.settle()

    stepped(run)


def test_idle_time_saves_up_nothing() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(Limits(max_inflight=1, max_queued=1000, queue_timeout_s=NEVER_S), now_s)
        client = Client(admission, now_s)
        for _ in range(50):
            client.ask(claim("a"))
        await asyncio.sleep(30.5)
        client.order.clear()
        for _ in range(15):
            client.ask(claim("late"))
        await asyncio.sleep(10)
        assert abs(client.order.count("late") - client.order.count("a")) <= 2
        await client.settle()

    stepped(run)


def test_in_a_full_queue_the_key_with_most_waiting_gives_way() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(Limits(max_inflight=1, max_queued=4), now_s)
        flood, other = Client(admission, now_s), Client(admission, now_s)
        for _ in range(7):
            flood.ask(claim("flood"))
        await asyncio.sleep(0.1)
        assert len(flood.refusals) == 2
        tasks = [other.ask(claim("other")) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert (len(flood.refusals), len(other.refusals)) == (4, 1), "each has two places in the queue"
        assert all(error.retry_after_s for error in flood.refusals)
        await asyncio.gather(*tasks)
        await flood.settle()
        assert admission.refusals == {"full": 3, "share": 2}
        assert {key.name: key.num_refused for key in admission.accounts()} == {"flood": 4, "other": 1}

    stepped(run)


def test_tokens_bound_what_runs_and_what_waits() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        limits = Limits(max_inflight=100, max_inflight_tokens=250, max_queued_tokens=300)
        client = Client(Admission(limits, now_s), now_s)
        client.ask(claim(num_prompt=1000))  # more than the limit: it runs, alone
        for _ in range(4):
            client.ask(claim())
        await asyncio.sleep(0.25)
        assert (client.admission.num_running, client.admission.num_waiting, len(client.refusals)) == (1, 3, 1)
        await asyncio.sleep(1)
        assert (client.admission.num_running, client.admission.num_waiting) == (2, 1)
        await client.settle()

    stepped(run)


def test_what_cannot_meet_its_deadline_is_refused_at_once() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        client = Client(Admission(Limits(max_inflight=2, queue_timeout_s=NEVER_S), now_s), now_s)
        for _ in range(60):
            client.ask(claim())
        await asyncio.sleep(20.25)  # it has learned by now: 20 wait, 2 are admitted a second
        began_s = now_s()
        await client.ask(claim(timeout_s=5.0))
        assert now_s() == began_s
        assert isinstance(client.refusals[0], Overloaded)
        assert "after the request's deadline" in str(client.refusals[0])
        assert client.refusals[0].retry_after_s == pytest.approx(10, abs=1.5)
        await client.ask(claim(timeout_s=14.0))
        assert len(client.refusals) == 1
        assert client.waits_s[-1] == pytest.approx(10, abs=1)
        await client.settle()

    stepped(run)


def test_first_tokens_come_within_the_limit_and_the_rest_is_refused_at_once() -> None:
    """The gangs take 8 requests at a time, 1 s each; there come 40 a second."""

    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(Limits(max_inflight=512, max_ttft_s=4.0), now_s)
        gang = asyncio.Semaphore(8)
        first_s: list[float] = []
        refused_s: list[float] = []

        async def ask() -> None:
            began_s = now_s()
            try:
                async with admission.place(claim()) as place, gang:
                    await asyncio.sleep(0.1)
                    place.tell(1)
                    first_s.append(now_s() - began_s)
                    await asyncio.sleep(0.9)
            except Overloaded:
                refused_s.append(now_s() - began_s)

        tasks = []
        for _ in range(40 * 60):
            tasks.append(asyncio.create_task(ask()))
            await asyncio.sleep(1 / 40)
        await asyncio.gather(*tasks)
        assert sorted(first_s)[int(0.99 * len(first_s))] <= 4.0
        assert max(first_s) <= 4.5, "while it learned"
        assert len(first_s) >= 0.95 * 8 * 60, "the gangs had work all the time"
        at_once = [wait_s for wait_s in refused_s if wait_s < 0.01]
        assert len(at_once) > 0.9 * len(refused_s)
        assert admission.expected_wait_s == 0.0
        await ask()  # and back to normal
        assert first_s[-1] == pytest.approx(0.1)

    stepped(run)


def test_nothing_is_left_of_any_schedule() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        draw = random.Random(7)
        limits = Limits(max_inflight=3, max_inflight_tokens=400, max_queued=6, queue_timeout_s=2.0, max_ttft_s=3.0)
        admission = Admission(limits, now_s)
        client = Client(admission, now_s, service_s=0.3)
        for _ in range(600):
            timeout_s = draw.choice([0.1, 1.0, NEVER_S])
            client.ask(claim(draw.choice("abc"), draw.randrange(1, 300), draw.randrange(1, 50), timeout_s))
            if draw.random() < 0.3:
                draw.choice(client.tasks).cancel()
            await asyncio.sleep(draw.choice([0.0, 0.0, 0.05, 0.2]))
            assert admission.num_waiting <= 6
            assert admission.num_running <= 3
        await asyncio.wait(client.tasks)
        client.tasks.clear()
        await client.settle()
        assert client.refusals
        assert client.order
        assert all(key.is_idle and not key.waiting_tokens for key in admission.accounts())

    stepped(run)


def test_keys_that_are_idle_are_forgotten() -> None:
    async def run(now_s: Callable[[], float]) -> None:
        admission = Admission(Limits(), now_s)
        for i in range(3000):
            async with admission.place(claim(f"key {i}")):
                pass
        assert len(admission.accounts()) <= 1024

    stepped(run)


def test_a_place_that_is_overdue_slows_the_rate() -> None:
    rate = DrainRate()
    rate.begin(0.0)
    assert rate.seconds(100, 0.0) is None
    for second in range(1, 21):
        rate.add(100, float(second), is_empty=False)
    assert rate.seconds(100, 20.0) == pytest.approx(1.0)
    stalled_s = rate.seconds(100, 60.0)
    assert stalled_s is not None
    assert stalled_s > 2.5
    rate.stop()
    assert rate.seconds(100, 1000.0) == pytest.approx(1.0), "time without anybody waiting does not count"


def test_the_first_tokens_time_follows_what_was_seen() -> None:
    times = FirstTokenTime()
    assert times.mean_s == 0.0
    for i in range(200):
        times.add(1.0 + 0.2 * (-1) ** i)
    assert times.mean_s == pytest.approx(1.0, abs=0.05)


def test_the_inflight_limit_grows_while_it_is_reached_and_falls_once_a_round() -> None:
    limit = InflightLimit(100, target_s=1.0)
    for _ in range(10):
        limit.first_token(0.0, 0.5, is_reached=False)
    assert limit.value == 4
    for _ in range(200):
        limit.first_token(0.0, 0.5, is_reached=True)
    assert limit.value == 100
    for _ in range(10):
        limit.first_token(0.0, 2.0, is_reached=True)
    assert limit.value == 85, "all of them were admitted before the decrease"
    for _ in range(85):
        limit.first_token(3.0, 3.5, is_reached=True)
    assert limit.value in (85, 86)
    assert InflightLimit(100, None).value == 100


@pytest.mark.parametrize(
    "fields", [{"max_inflight_tokens": 0}, {"max_queued_tokens": 0}, {"max_ttft_s": 0.0}, {"key_weights": {"a": 0.0}}]
)
def test_wrong_limits_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        Limits(**fields)
