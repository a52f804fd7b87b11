"""The Ray actor that owns a service's gangs: it runs its pools and tells front ends, by long poll, where the gangs are.

Gangs are owned by this actor, so Ray ends them when it dies. Ray restarts it; it then removes what its earlier life
reserved and starts new gangs. With a lifeline it ends with the process that started it, whatever becomes of that. No
prompt and no token passes through here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.actor import ActorHandle

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.gang import Gang
from tensorweave.cluster.lifeline import OwnLifeline, end_with
from tensorweave.cluster.placement import remove_groups
from tensorweave.cluster.pool import GangPool, PoolSpec, PoolState
from tensorweave.cluster.protocol import KvRoad
from tensorweave.cluster.roads import Pair, Roads

logger = logging.getLogger(__name__)

_MAX_RESTARTS: Final = 10
_MAX_WATCHERS: Final = 1000
_GIVE_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class ServiceState:
    """All pools at one moment. `version` differs from that of every other moment, also of an earlier life. `roads`: by
    the ids of a decode gang and a prefill gang, what the way between them carries."""

    version: int
    pools: tuple[PoolState, ...]
    roads: Mapping[Pair, KvRoad] = field(default_factory=dict)


class PoolSupervisor:
    """Make it an actor with `start_supervisor`. Starts its pools at the first call of any method."""

    def __init__(self, pools: Sequence[PoolSpec], worker_class: type[Any], lifeline: str | None = None) -> None:
        if lifeline is not None:
            end_with(lifeline)
        names = [pool.name for pool in pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pool names must differ: {', '.join(names)}")
        self._specs = tuple(pools)
        self._worker_class = worker_class
        self._pools: list[GangPool] = []
        self._roads = Roads(self._publish)
        self._version = time.time_ns()
        self._changed: asyncio.Event
        self._prefix: str
        self._starting: asyncio.Task[None] | None = None

    async def watch(self, version: int, timeout_s: float) -> ServiceState:
        """The state as soon as its version is not `version`, or after `timeout_s`."""
        await self._ensure_started()
        try:
            async with asyncio.timeout(timeout_s):
                while self._version == version:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return ServiceState(self._version, tuple(pool.state for pool in self._pools), self._roads.all)

    async def describe(self) -> list[dict[str, Any]]:
        """Every pool, gang and rank, for health pages and metrics."""
        await self._ensure_started()
        pools = [pool.describe() for pool in self._pools]
        for gang in (gang for pool in pools for gang in pool["gangs"]):
            if roads := self._roads.describe(gang.get("gang_id", "")):
                gang["kv_roads"] = roads
        return pools

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """Callables by name for every rank of every gang, also of those to come: references in `processors`, which are
        loaded by the ranks alone; None takes one away. Raises ValueError where a rank cannot load one."""
        await self._ensure_started()
        await asyncio.gather(*(pool.set_logits_processors(processors) for pool in self._pools))

    async def scale(self, name: str, replicas: int, drain_timeout_s: float) -> None:
        """Give a pool more gangs or fewer; those that go let their requests end first. Raises ValueError for a pool
        that is not there."""
        await self._ensure_started()
        pools = {pool.spec.name: pool for pool in self._pools}
        if name not in pools:
            raise ValueError(f"there is no pool {name!r}; there are: {', '.join(pools)}")
        await pools[name].scale(replicas, drain_timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """End all pools, open requests first; those that give KV away end after those that take it. `timeout_s` is for
        all of it."""
        await self._ensure_started()
        end_s = time.monotonic() + timeout_s
        takers = [pool for pool in self._pools if pool.spec.gang.role != "prefill"]
        givers = [pool for pool in self._pools if pool.spec.gang.role == "prefill"]
        for pools in (takers, givers):
            left_s = max(0.0, end_s - time.monotonic())
            await asyncio.gather(*(pool.drain(left_s) for pool in pools))
        await self._remove_leftovers()

    async def stop(self) -> None:
        """End all pools now."""
        await self._ensure_started()
        await asyncio.gather(*(pool.stop() for pool in self._pools))
        await self._remove_leftovers()

    async def _remove_leftovers(self) -> None:
        """Placement groups outlive the actor that made them, and a kill that was cut short may have left one."""
        await asyncio.to_thread(remove_groups, self._prefix)

    async def _ensure_started(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        self._changed = asyncio.Event()
        self._prefix = f"tensorweave-{ray.get_runtime_context().get_actor_id()}-"
        await self._remove_leftovers()
        self._pools = [self._make_pool(spec, self._prefix) for spec in self._specs]
        for pool in self._pools:
            pool.start()

    def _make_pool(self, spec: PoolSpec, prefix: str) -> GangPool:
        def launch(slot: int, epoch: int) -> Gang:
            gang_id = f"{spec.name}-{slot}.{epoch}-{secrets.token_hex(3)}"
            return Gang(spec.gang, self._worker_class, gang_id, epoch, prefix + gang_id)

        return GangPool(spec, launch, self._publish)

    def _publish(self) -> None:
        """Wake everyone who waits; the event is replaced, so that nobody misses or repeats a change."""
        self._roads.update([gang for pool in self._pools for gang in pool.ready])
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def start_supervisor(
    pools: Sequence[PoolSpec],
    worker_class: type[Any],
    *,
    name: str | None = None,
    lifeline: OwnLifeline | None = None,
) -> ActorHandle[PoolSupervisor]:
    """Start the actor. It and all that it places end with `lifeline`; without one it ends with its creator, and the
    places are free again when the job ends. Ray must be up."""
    actor: ActorHandle[PoolSupervisor] = (
        ray.remote(PoolSupervisor)
        .options(
            num_cpus=0,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=0,
            max_concurrency=_MAX_WATCHERS,
            name=name,
            lifetime=None if lifeline is None else "detached",
        )
        .remote(tuple(pools), worker_class, None if lifeline is None else lifeline.name)
    )
    return actor


async def give_logits_processors(
    supervisor: ActorHandle[PoolSupervisor], processors: Mapping[str, Callable[..., object] | None]
) -> None:
    """Through Ray, by which these processes trust each other, to every rank. Raises ValueError, NotReady."""
    try:
        references = {name: None if each is None else ray.put(each) for name, each in processors.items()}
    except TypeError as error:
        raise ValueError(f"a logits processor cannot be sent to the ranks: {error}") from error
    try:
        async with asyncio.timeout(_GIVE_TIMEOUT_S):
            await supervisor.set_logits_processors.remote(references)
    except TimeoutError:
        raise NotReady(f"the ranks did not take a logits processor within {_GIVE_TIMEOUT_S:g} s") from None
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        raise NotReady(f"the supervisor does not answer: {type(error).__name__}") from error


def stop_supervisor(supervisor: ActorHandle[PoolSupervisor], drain_timeout_s: float = 0.0) -> None:
    """Drain, or stop at once with a timeout of 0, and end the actor. Blocks; for drivers."""
    call = supervisor.drain.remote(drain_timeout_s) if drain_timeout_s > 0 else supervisor.stop.remote()
    try:
        ray.get(call, timeout=drain_timeout_s + 30.0)
    except ray.exceptions.RayError as error:
        logger.warning("the supervisor did not stop cleanly: %s", error)
    finally:
        ray.kill(supervisor, no_restart=True)
