"""`ServicePools`: the operator's changes of a running service, for the admin port."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError
from tensorweave.cluster.ray_session import cluster_has_gpus
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.deployment import Deployment
from tensorweave.deploy.supervisor_calls import FindSupervisor, call_supervisor

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S: Final = 30.0
_SLACK_S: Final = 30.0
_ACCEPT_S: Final = 1.0
"""A supervisor that cannot be reached is noticed within this."""


class CurrentDeployment:
    """The deployment that holds, for all threads of a process: it is replaced whole."""

    def __init__(self, deployment: Deployment) -> None:
        self.value = deployment

    @property
    def config(self) -> ServeConfig:
        return self.value.config


class ServicePools:
    """Satisfies `router.admin.pools.PoolControl`."""

    def __init__(
        self,
        find_supervisor: FindSupervisor,
        current: CurrentDeployment,
        has_gpus: Callable[[], bool] = cluster_has_gpus,
    ) -> None:
        self._find = find_supervisor
        self._current = current
        self._has_gpus = has_gpus
        self._scaling: set[asyncio.Task[Any]] = set()

    async def scale(self, pool: str, replicas: int) -> None:
        """Return once the supervisor wants so many gangs; they start and drain later."""
        pools = self._current.config.pools
        if (own := pools.get(pool)) is None:
            raise RequestRejected(f"there is no pool {pool!r}; there are: {', '.join(pools)}", param="pool")
        if not (own.min_replicas or 1) <= replicas <= (own.max_replicas or replicas):
            bounds = f"min_replicas {own.min_replicas or 1}, max_replicas {own.max_replicas or 'none'}"
            raise RequestRejected(
                f"{replicas} gangs are outside the bounds of pool {pool!r}: {bounds}", param="replicas"
            )
        drain_s = self._current.config.limits.drain_timeout_s
        task = asyncio.create_task(
            call_supervisor(
                self._find, lambda found: found.scale.remote(pool, replicas, drain_s, "by command"), drain_s + _SLACK_S
            )
        )
        self._scaling.add(task)
        task.add_done_callback(self._note_scaled)
        await asyncio.wait({task}, timeout=_ACCEPT_S)
        if task.done():
            task.result()

    def _note_scaled(self, task: asyncio.Task[Any]) -> None:
        self._scaling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("a pool was not scaled: %s", error)

    async def move(self, source: str, target: str, gang_id: str | None, timeout_s: float | None) -> str:
        drain_s = self._current.config.limits.drain_timeout_s if timeout_s is None else timeout_s
        moved: str = await call_supervisor(
            self._find,
            lambda found: found.move.remote(source, target, gang_id, drain_s, "by command"),
            drain_s + _SLACK_S,
        )
        return moved

    async def update(self, plain: Mapping[str, Any]) -> list[str]:
        """Begin to change to this configuration. Return the names of the pools whose gangs are replaced."""
        old = self._current.value
        try:
            new = await asyncio.to_thread(old.changed, plain, time.time_ns(), has_gpus=self._has_gpus())
        except TensorweaveError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise RequestRejected(str(error), param="config") from error
        if self._current.value is not old:
            raise NotReady("another update has come at the same time; look at what holds now, and try again")
        await call_supervisor(self._find, new.apply, _CALL_TIMEOUT_S)
        self._current.value = new
        before = {spec.name: spec.gang for spec in old.specs}
        return [spec.name for spec in new.specs if before.get(spec.name) != spec.gang]
