"""`Controller`: measures the pools every few seconds, asks `deploy.scaling` what to change, and has the supervisor do
it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ray.exceptions import RayError

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.pool_control import CurrentDeployment
from tensorweave.deploy.pool_loads import PoolLoads
from tensorweave.deploy.scaling import Change, Move, PoolLoad, Trends, decide
from tensorweave.deploy.supervisor_calls import FindSupervisor, call_supervisor
from tensorweave.router.admin.router_table import RouterTable

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S: Final = 10.0
_SLACK_S: Final = 30.0


class Controller:
    """`pressures` are the latest, by pool: the number, and what was measured; any thread may read them."""

    def __init__(
        self,
        find_supervisor: FindSupervisor,
        routers: RouterTable,
        current: CurrentDeployment,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pressures: dict[str, tuple[float, str]] = {}
        self._find = find_supervisor
        self._routers = routers
        self._current = current
        self._clock = clock
        self._loads = PoolLoads()
        self._trends = Trends()

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self._current.config.scaling.interval_s)
            if not may_change(self._current.config):
                continue
            try:
                await self.step()
            except (TensorweaveError, RayError) as error:
                logger.warning("pools are left as they are: %s", str(error).partition("\n")[0])
            except Exception:  # the loop's boundary: what one measurement meets does not end all later ones
                logger.exception("pools are left as they are")

    async def step(self) -> Change | None:
        """One measurement, and what follows of it. Return the change that was made."""
        config = self._current.config
        self._routers.note_watched()
        pools: Sequence[dict[str, Any]] = await call_supervisor(
            self._find, lambda found: found.describe.remote(), _CALL_TIMEOUT_S
        )
        loads = self._loads.measure(config, pools, self._routers.latest(), self._clock())
        self._note(loads)
        if any(pool.get("is_updating") for pool in pools):
            return None
        self._trends, change = decide(config.scaling, loads, self._clock(), self._trends)
        if change is not None:
            await self._carry_out(change, config.limits.drain_timeout_s)
        return change

    def _note(self, loads: Sequence[PoolLoad]) -> None:
        self.pressures = {load.name: (load.pressure, load.reason) for load in loads}

    async def _carry_out(self, change: Change, drain_s: float) -> None:
        if isinstance(change, Move):
            arguments: tuple[Any, ...] = (change.source, change.target, None, drain_s, change.reason)
            await call_supervisor(self._find, lambda found: found.move.remote(*arguments), drain_s + _SLACK_S)
        else:
            arguments = (change.pool, change.replicas, drain_s, change.reason)
            await call_supervisor(self._find, lambda found: found.scale.remote(*arguments), drain_s + _SLACK_S)


def may_change(config: ServeConfig) -> bool:
    return config.scaling.moves or any(pool.min_replicas or pool.max_replicas for pool in config.pools.values())
