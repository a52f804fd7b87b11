"""The driver's monitor: a healthy service, a cluster that is gone, and gangs that all keep failing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tensorweave.deploy.monitor import Pools, RayLost, ServiceFailed, monitor

OUTAGE_S = 100.0


class FakeClock:
    """A stop signal whose every wait takes its time at once, and that comes after so many of them."""

    def __init__(self, num_turns: int) -> None:
        self.now_s = 0.0
        self._num_turns = num_turns

    def wait(self, timeout_s: float | None = None) -> bool:
        self.now_s += timeout_s or 0.0
        self._num_turns -= 1
        return self._num_turns < 0

    def __call__(self) -> float:
        return self.now_s


class FakeCluster:
    """Answers turn by turn, the last answer for ever."""

    def __init__(self, *, alive: list[bool | None] | None = None, pools: list[Pools | None] | None = None) -> None:
        self._alive = _then_for_ever(alive or [True])
        self._pools = _then_for_ever(pools or [[pool()]])

    def is_node_alive(self) -> bool | None:
        return next(self._alive)

    def pools(self) -> Pools | None:
        return next(self._pools)


def _then_for_ever(answers: list[Any]) -> Iterator[Any]:
    yield from answers
    while True:
        yield answers[-1]


def pool(failure: str | None = None, role: str = "both") -> dict[str, Any]:
    return {"pool": role, "role": role, "failure": failure, "gangs": []}


def monitored(cluster: FakeCluster, num_turns: int = 1000) -> tuple[float, list[Pools]]:
    """Seconds until it ends, and what was told."""
    clock, told = FakeClock(num_turns), []
    monitor(cluster, clock, OUTAGE_S, told.append, clock)
    return clock.now_s, told


def test_a_sound_service_is_left_alone_until_it_is_asked_to_stop() -> None:
    assert monitored(FakeCluster(), 5) == (12.0, [[pool()]] * 5)


def test_a_host_that_ray_counts_as_dead_ends_its_driver_at_once() -> None:
    with pytest.raises(RayLost, match="Ray considers this host dead"):
        monitored(FakeCluster(alive=[True, True, False]))


def test_a_head_that_is_silent_for_a_while_is_waited_for() -> None:
    monitored(FakeCluster(alive=[True, *[None] * 20, True]), 100)
    with pytest.raises(RayLost, match="the head of the Ray cluster has not answered for 45 s"):
        monitored(FakeCluster(alive=[True, None]))


def test_a_service_actor_that_ray_starts_again_is_waited_for() -> None:
    monitored(FakeCluster(pools=[[pool()], *[None] * 20, [pool()]]), 100)
    with pytest.raises(RayLost, match="service actor on the head node has not answered for 45 s"):
        monitored(FakeCluster(pools=[[pool()], None]))


def test_gangs_that_all_fail_for_long_end_the_service_and_say_why() -> None:
    failed = [pool("no such model")]
    monitored(FakeCluster(pools=[[pool()], *[failed] * 45, [pool()], *[failed] * 45, [pool()]]), 200)
    with pytest.raises(ServiceFailed, match=r"no gang has served requests for 100 s .*: pool both: no such model"):
        monitored(FakeCluster(pools=[[pool()], failed]))


def test_a_service_that_can_do_without_a_pool_goes_on() -> None:
    without_prefill = [pool("no such model", "prefill"), pool(None, "decode")]
    assert monitored(FakeCluster(pools=[without_prefill]), 500)[1] == [without_prefill] * 500
