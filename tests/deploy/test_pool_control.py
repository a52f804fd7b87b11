"""An operator's changes of a running service: what is refused before the supervisor hears of it, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.controller import Controller
from tensorweave.deploy.deployment import Deployment
from tensorweave.deploy.pool_control import CurrentDeployment, ServicePools
from tensorweave.deploy.scaling import Move
from tensorweave.router.admin.router_table import RouterTable

_PLAIN: dict[str, Any] = {"model": "m", "pools": {"prefill": {}, "decode": {"min_replicas": 1, "max_replicas": 3}}}


class _Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class _Supervisor:
    """Notes what it is asked to do; `pools` is what it describes."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.pools: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> _Method:
        async def call(*arguments: Any) -> Any:
            if name == "describe":
                return self.pools
            self.asked.append((name, *arguments))
            return None

        return _Method(call)


def _current(**changes: Any) -> CurrentDeployment:
    return CurrentDeployment(Deployment(ServeConfig.model_validate(_PLAIN | changes), (), 1))


def test_a_size_outside_the_bounds_and_an_unknown_pool_are_refused() -> None:
    supervisor = _Supervisor()
    control = ServicePools(lambda: supervisor, _current(), has_gpus=lambda: False)  # type: ignore[arg-type,return-value]

    async def body() -> None:
        with pytest.raises(RequestRejected, match=r"4 gangs are outside the bounds of pool 'decode': .*max_replicas 3"):
            await control.scale("decode", 4)
        with pytest.raises(RequestRejected, match="no pool 'main'; there are: prefill, decode"):
            await control.scale("main", 1)
        await control.scale("decode", 3)

    asyncio.run(body())
    [(name, pool, replicas, _, reason)] = supervisor.asked
    assert (name, pool, replicas, reason) == ("scale", "decode", 3, "by command")


def test_without_a_supervisor_a_change_is_refused() -> None:
    def find() -> Any:
        raise ValueError("none")

    control = ServicePools(find, _current(), has_gpus=lambda: False)
    for call in (control.scale("decode", 2), control.move("prefill", "decode", None, 1.0)):
        with pytest.raises(NotReady, match="there is no supervisor yet"):
            asyncio.run(call)


def test_the_controller_has_the_supervisor_move_a_gang_unless_an_update_is_under_way() -> None:
    supervisor = _Supervisor()
    waiting = {"state": "ready", "ranks": [{"gauges": {"num_requests_waiting": 9.0}}]}
    idle = {"state": "ready", "ranks": [{"gauges": {}}]}
    supervisor.pools = [
        {"pool": "prefill", "role": "prefill", "replicas": 1, "gangs": [waiting], "is_updating": True},
        {"pool": "decode", "role": "decode", "replicas": 2, "gangs": [idle, idle], "is_updating": True},
    ]
    current = _current(scaling={"moves": True, "hold_s": 0, "pause_s": 60})
    controller = Controller(lambda: supervisor, RouterTable(), current, clock=lambda: 100.0)  # type: ignore[arg-type,return-value]

    async def body() -> None:
        assert await controller.step() is None
        assert not supervisor.asked
        for pool in supervisor.pools:
            pool["is_updating"] = False
        change = await controller.step()
        assert isinstance(change, Move)
        assert "9.0 sequences wait per gang, of 4" in change.reason
        assert await controller.step() is None, "nothing changes for `pause_s`"

    asyncio.run(body())
    assert [call[:4] for call in supervisor.asked] == [("move", "decode", "prefill", None)]
    assert controller.pressures["prefill"] == (2.25, "9.0 sequences wait per gang, of 4")


def test_a_controller_goes_on_after_an_unexpected_answer(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = _Supervisor()
    supervisor.pools = [{"pool": "prefill"}]
    current = _current(scaling={"moves": True, "interval_s": 0.001})
    controller = Controller(lambda: supervisor, RouterTable(), current)  # type: ignore[arg-type,return-value]

    async def body() -> None:
        running = asyncio.create_task(controller.run())
        async with asyncio.timeout(60):
            while caplog.text.count("pools are left as they are") < 2:
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(body())
