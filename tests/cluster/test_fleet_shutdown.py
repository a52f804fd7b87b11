"""The end of a service of two pools: front ends hear of it at once, and both pools' ends share one time."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_set import PoolSet
from tensorweave.cluster.pool_spec import GangState, PoolSpec, PoolState
from tensorweave.cluster.protocol import Role
from tensorweave.cluster.service_state import ServiceState


def state_of(**states: tuple[GangState, ...]) -> ServiceState:
    roles: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "main": "both"}
    pools = [PoolState(name, len(own), (), own, role=roles[name]) for name, own in states.items()]
    return ServiceState(1, tuple(pools))


@pytest.mark.parametrize(
    ("state", "is_open"),
    [
        (state_of(), True),
        (state_of(main=("starting",)), True),
        (state_of(main=("ready", "draining")), True),
        (state_of(main=("draining", "stopped")), False),
        (state_of(prefill=("ready",), decode=("failed",)), True),
        (state_of(prefill=("draining",), decode=("ready",)), True),
        (state_of(prefill=("ready",), decode=("draining",)), False),
        (state_of(prefill=("ready",), decode=()), True),
    ],
)
def test_a_fleet_is_open_until_its_gangs_that_decode_end(state: ServiceState, is_open: bool) -> None:
    fleet = WatchedFleet.__new__(WatchedFleet)
    fleet._state = state
    if is_open:
        fleet.check_open()
        return
    with pytest.raises(NotReady, match="shutting down") as caught:
        fleet.check_open()
    assert caught.value.retry_after_s


class SteppedTime:
    """`time`, on a clock that stands until it is set on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return int(self.now_s * 1e9)


class SlowPool:
    """Takes all the time that it is given."""

    def __init__(self, role: Role, order: list[tuple[str, float]], clock: SteppedTime) -> None:
        self.spec = PoolSpec(role, GangSpec(role))
        self._order = order
        self._clock = clock

    async def drain(self, timeout_s: float) -> None:
        self._order.append((self.spec.name, timeout_s))
        self._clock.now_s += timeout_s


def test_pools_that_end_one_after_another_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[tuple[str, float]]:
        order: list[tuple[str, float]] = []
        clock = SteppedTime()
        monkeypatch.setattr("tensorweave.cluster.pool_set.time", clock)
        pools = PoolSet(lambda spec: pytest.fail("no pool is made"), lambda: None)
        pools.all = cast(Any, [SlowPool(role, order, clock) for role in ("prefill", "decode")])
        await pools.drain(5.0)
        return order

    assert asyncio.run(run()) == [("decode", 5.0), ("prefill", 0.0)]
