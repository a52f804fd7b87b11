"""`PoolSupervisor`: the Ray actor that owns a service's gangs. It runs the pools and publishes, by long poll, where the
gangs are.

Ray restarts it when it dies. The supervisor of the LLM class ends with the process that started it, and its gangs end
with it. The supervisor of a service is detached, and so are its gangs: they continue to serve while it restarts, and it
then resumes them. No prompt and no token passes through it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final

import ray

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.adapter_registry import AdapterRegistry
from tensorweave.cluster.gang import Gang
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.kv_links import KvLinkTable, ReadyGang
from tensorweave.cluster.log_setup import LogSettings, set_up_logging
from tensorweave.cluster.placement import remove_groups
from tensorweave.cluster.placement_rule import PoolPlaces
from tensorweave.cluster.plan_keeper import PlanKeeper
from tensorweave.cluster.pool import GangPool
from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.pool_set import PoolSet
from tensorweave.cluster.pool_spec import PoolPlan, PoolSpec
from tensorweave.cluster.process_sentinel import end_actor_with
from tensorweave.cluster.resource_requests import ResourceRequests
from tensorweave.cluster.service_state import DetachedSpec, ServiceState
from tensorweave.cluster.supervisor_handle import find_supervisor, stop_supervisor
from tensorweave.cluster.takeover import find_running
from tensorweave.cluster.watchers import FORGET_S, Watchers

logger = logging.getLogger(__name__)

_LEASE_S: Final = 60.0
"""Front ends call every 10 s, Serve's health check every 5 s."""
_CHECK_INTERVAL_S: Final = 2.0
_TELL_TIMEOUT_S: Final = FORGET_S + 1.0
"""A front end that stands still for seconds is waited for; one that has ended is forgotten before."""


class PoolSupervisor:
    """Started by `cluster.supervisor_start`. It starts its pools at the first call.

    If it is `detached`, its gangs outlive it: after a restart it resumes those that match its specs. It ends itself if
    it was not called for `_LEASE_S`. With a `sentinel` it ends when that ends.
    """

    def __init__(
        self,
        pools: Sequence[PoolSpec],
        worker_class: type[Any],
        sentinel: str | None = None,
        detached: DetachedSpec | None = None,
        log: LogSettings | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        if log is not None:
            set_up_logging(log, "supervisor")
        if sentinel is not None:
            end_actor_with(sentinel)
        self._worker_class = worker_class
        self._detached = detached
        self._notice: str | None = None
        self._num_updates = 0
        self._keeper = PlanKeeper(PoolPlan(specs=_checked(pools)))
        self._pools = PoolSet(self._make_pool, self._publish)
        self._adapters = AdapterRegistry(adapters, self._ready_gangs, self._publish)
        self._watchers = Watchers()
        self._requests = ResourceRequests()
        self._links = KvLinkTable(self._publish)
        self._version = time.time_ns()
        self._num_idle_checks = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        if detached is not None:
            threading.Thread(target=self._end_when_idle, args=(detached,), name="lease", daemon=True).start()

    async def watch(self, version: int, timeout_s: float, watcher: str = "") -> ServiceState:
        """Return the state once its version is not `version`, which this `watcher` has, or after `timeout_s`."""
        await self._ensure_started()
        self._watchers.note(watcher, version)
        try:
            async with asyncio.timeout(timeout_s):
                while self._version == version:
                    await self._changed.wait()
        except TimeoutError:
            pass
        pools = tuple(pool.state for pool in self._pools.all)
        return ServiceState(self._version, pools, self._links.all, self._adapters.all)

    async def describe(self) -> list[dict[str, Any]]:
        """Every pool, gang and rank, for health pages and metrics."""
        await self._ensure_started()
        pools = [pool.describe() for pool in self._pools.all]
        for pool in pools:
            pool |= {"notice": self._notice, "is_updating": self._num_updates > 0}
        for gang in (gang for pool in pools for gang in pool["gangs"]):
            if links := self._links.describe(gang.get("gang_id", "")):
                gang["kv_links"] = links
        return pools

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """Set logits processors, by name, on every rank of all present and future gangs. `processors` are references,
        which only the ranks load; None removes one. Raises ValueError if a rank cannot load one."""
        await self._ensure_started()
        await asyncio.gather(*(pool.set_logits_processors(processors) for pool in self._pools.all))

    async def load_adapter(self, name: str, path: str, *, is_new: bool = False) -> Adapter:
        """Load an adapter on every gang, in place of one of the same name unless `is_new`. When this returns, all front
        ends give new requests this one. Raises ValueError, or NotReady if no gang is ready."""
        await self._ensure_started()
        adapter = await self._adapters.load(name, path, is_new=is_new)
        await self._watchers.until_at(self._version, _TELL_TIMEOUT_S)
        return adapter

    async def unload_adapter(self, name: str) -> None:
        """When this returns, all front ends refuse new requests with this adapter. Raises ValueError if there is
        none."""
        await self._ensure_started()
        await self._adapters.unload(name)
        await self._watchers.until_at(self._version, _TELL_TIMEOUT_S)

    async def scale(self, name: str, replicas: int, drain_timeout_s: float, reason: str = "") -> None:
        """Change the number of a pool's gangs; gangs that are removed finish their requests first. Raises ValueError
        for an unknown pool."""
        await self._ensure_started()
        await self._pools.scale(name, replicas, drain_timeout_s, reason)

    async def move(
        self, source: str, target: str, gang_id: str | None, drain_timeout_s: float, reason: str = ""
    ) -> str:
        """Let a gang of one pool serve in another once its work has ended, without a restart. Return its id. Raises
        ValueError, NotReady or WorkerLost: see `PoolSet.move`."""
        await self._ensure_started()
        return await self._pools.move(source, target, gang_id, drain_timeout_s, reason)

    async def drain(self, timeout_s: float) -> None:
        """End all pools after their open requests. `timeout_s` is the limit for all of it."""
        await self._ensure_started()
        await self._pools.drain(timeout_s)
        await self._requests.withdraw()
        await self._remove_leftovers()

    async def stop(self) -> None:
        """End all pools now. If they were never started, they are not started for that."""
        if self._starting is not None:
            await self._ensure_started()
            await self._pools.stop()
        await self._requests.withdraw()
        await self._remove_leftovers()

    async def apply(
        self,
        pools: Sequence[PoolSpec],
        generation: int,
        drain_timeout_s: float,
        notice: str | None = None,
        adapters: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> PoolPlan:
        """Change to these pools, without an interruption: see `PoolSet.update`. Returns at once what holds now: a call
        with a lower `generation` than an earlier one has no effect. `notice` is for health pages. `adapters` are
        the directories of the service's file, by name; `config` is kept for the callers."""
        await self._ensure_started()
        specs = _checked(pools)
        plan = self._keeper.plan
        if generation < plan.generation:
            return plan
        self._notice = notice
        if adapters is not None:
            self._spawn(self._adapters.configure(adapters, generation))
        if generation > plan.generation or specs != plan.specs:
            self._keeper.deploy(specs, generation, config or {})
            self._publish()
        if specs != plan.specs:
            self._num_updates += 1
            self._spawn(self._update(specs, drain_timeout_s))
        return self._keeper.plan

    async def _update(self, specs: Sequence[PoolSpec], drain_timeout_s: float) -> None:
        try:
            await self._pools.update(specs, drain_timeout_s)
        finally:
            self._num_updates -= 1

    async def _remove_leftovers(self) -> None:
        """Placement groups outlive the actor that created them, and an interrupted kill may have left one."""
        await asyncio.to_thread(remove_groups, self._prefix)

    async def _ensure_started(self) -> None:
        """A start that failed because Ray did not answer is tried again at the next call."""
        self._num_idle_checks = 0
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        running = await self._take_over()
        plan = self._keeper.plan
        self._pools.start(plan.specs, plan.sizes, running)
        if any(gangs for gangs in running.values()):  # a change may have been under way
            self._spawn(self._pools.finish(_LEASE_S))
        self._publish()

    @property
    def _prefix(self) -> str:
        """The prefix of our placement groups' names."""
        name = ray.get_runtime_context().get_actor_id() if self._detached is None else self._detached.name
        return f"tensorweave-{name}/"

    async def _take_over(self) -> dict[str, dict[int, ReadyGang]]:
        """Resume the gangs from before a restart, by pool and slot, and the plan that they have kept."""
        running: dict[str, dict[int, ReadyGang]] = {}
        if self._detached is None:
            await self._remove_leftovers()
            return running
        namespace = self._detached.namespace
        plan, found = await find_running(self._prefix, self._keeper.plan, self._worker_class, namespace)
        self._keeper = PlanKeeper(plan)
        for record, gang in found:
            running.setdefault(record.pool, {})[record.slot] = (gang, record.address)
        for kept in await asyncio.gather(*(gang.kept_adapters() for _, gang in found)):
            self._adapters.resume(kept)
        return running

    def _end_when_idle(self, detached: DetachedSpec) -> None:
        """Runs on a thread, so that it also ends a supervisor that was never called. Counts checks without a call
        rather than seconds, because a host that was paused has received no calls."""
        pause = threading.Event()
        while self._num_idle_checks * _CHECK_INTERVAL_S < _LEASE_S:
            pause.wait(_CHECK_INTERVAL_S)
            self._num_idle_checks += 1
        logger.warning("not called for %g s: ending the pools", _LEASE_S)
        stop_supervisor(find_supervisor(detached))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _make_pool(self, spec: PoolSpec) -> GangPool:
        namespace = None if self._detached is None else self._detached.namespace
        places = PoolPlaces(f"{self._prefix}{spec.name}-", spec.gang.placement)

        def launch(gang: GangSpec, slot: int, epoch: int) -> Gang:
            gang_id = f"{spec.name}-{slot}.{epoch}-{secrets.token_hex(3)}"
            group = self._prefix + gang_id
            places.rule = gang.placement
            return Gang(
                *(gang, self._worker_class, gang_id, epoch, group),
                pool=spec.name,
                slot=slot,
                namespace=namespace,
                places=places,
            )

        adapters = None if spec.gang.role == "embed" else self._adapters
        return GangPool(spec, launch, self._publish, adapters=adapters)

    def _ready_gangs(self) -> list[PoolGang]:
        """The gangs that adapters are for."""
        pools = [pool for pool in self._pools.all if pool.spec.gang.role != "embed"]
        return [gang for pool in pools for gang, _ in pool.ready]

    def _publish(self) -> None:
        """Wake all pending `watch` calls. The event is replaced, so that none misses or repeats a change."""
        ready = self._pools.ready
        self._links.update(ready)
        if self._detached is not None:
            self._keeper.update(self._pools.sizes, [gang for gang, _ in ready])
            self._requests.update([(pool.spec.gang, pool.replicas) for pool in self._pools.all])
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _checked(pools: Sequence[PoolSpec]) -> tuple[PoolSpec, ...]:
    names = [pool.name for pool in pools]
    if len(set(names)) != len(names):
        raise ValueError(f"pool names must differ: {', '.join(names)}")
    return tuple(pools)
