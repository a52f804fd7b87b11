"""The Ray actor that owns a service's gangs: it runs its pools and tells front ends, by long poll, where the gangs are.

Ray restarts it when it dies. The LLM class's ends with the process that started it, whatever becomes of that, and its
gangs with it. A service's is detached, and so are its gangs: they serve on while it is away, and it goes on with them.
No prompt and no token passes through here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.actor import ActorHandle

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.gang import Gang
from tensorweave.cluster.kv_links import LinkTable, Pair, ReadyGang
from tensorweave.cluster.owner_liveness import OwnLifeline, end_with
from tensorweave.cluster.placement import remove_groups
from tensorweave.cluster.pool import GangPool, PoolSpec, PoolState
from tensorweave.cluster.protocol import LinkMeasurement
from tensorweave.cluster.takeover import find_running

logger = logging.getLogger(__name__)

_MAX_RESTARTS: Final = 10
_MAX_WATCHERS: Final = 1000
_GIVE_TIMEOUT_S: Final = 60.0
_LEASE_S: Final = 60.0
"""Front ends ask every 10 s, Serve's health check every 5 s."""
_TURN_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Home:
    """Where a supervisor that outlives its creator is found, and what its node must have."""

    name: str
    namespace: str
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """All pools at one moment. `version` differs from that of every other moment, also of an earlier life. `links`: by
    the ids of a decode gang and a prefill gang, what the way between them carries."""

    version: int
    pools: tuple[PoolState, ...]
    links: Mapping[Pair, LinkMeasurement] = field(default_factory=dict)


class PoolSupervisor:
    """Make it an actor with `start_supervisor` or `find_or_start_supervisor`. Starts its pools at the first call.

    With a `home` its gangs outlive it: after a restart it goes on with those that run as it would start them now. It
    ends by itself when nobody has asked it anything for `_LEASE_S`, and with its `lifeline`, where it has one.
    """

    def __init__(
        self,
        pools: Sequence[PoolSpec],
        worker_class: type[Any],
        lifeline: str | None = None,
        home: Home | None = None,
    ) -> None:
        if lifeline is not None:
            end_with(lifeline)
        self._specs = _checked(pools)
        self._worker_class = worker_class
        self._home = home
        self._generation = 0
        self._notice: str | None = None
        self._pools: list[GangPool] = []
        self._links = LinkTable(self._publish)
        self._version = time.time_ns()
        self._num_silent = 0
        self._changed = asyncio.Event()
        self._applying = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        if home is not None:
            threading.Thread(target=self._end_when_forgotten, args=(home,), name="lease", daemon=True).start()

    async def watch(self, version: int, timeout_s: float) -> ServiceState:
        """The state as soon as its version is not `version`, or after `timeout_s`."""
        await self._ensure_started()
        try:
            async with asyncio.timeout(timeout_s):
                while self._version == version:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return ServiceState(self._version, tuple(pool.state for pool in self._pools), self._links.all)

    async def describe(self) -> list[dict[str, Any]]:
        """Every pool, gang and rank, for health pages and metrics."""
        await self._ensure_started()
        pools = [pool.describe() for pool in self._pools]
        for pool in pools:
            pool["notice"] = self._notice
        for gang in (gang for pool in pools for gang in pool["gangs"]):
            if links := self._links.describe(gang.get("gang_id", "")):
                gang["kv_links"] = links
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
        """End all pools now; what has not started does not start for that."""
        if self._starting is not None:
            await self._ensure_started()
            await asyncio.gather(*(pool.stop() for pool in self._pools))
        await self._remove_leftovers()

    async def apply(
        self, pools: Sequence[PoolSpec], generation: int, drain_timeout_s: float, notice: str | None = None
    ) -> None:
        """These pools from now on: those that differ are drained and started anew, the others go on. Returns at once.
        Of two callers the one with the higher `generation` is heard, whoever comes last. `notice` is for health pages.
        """
        await self._ensure_started()
        specs = _checked(pools)
        if generation < self._generation:
            return
        self._generation, self._notice = generation, notice
        if specs != self._specs:
            self._specs = specs
            self._spawn(self._change_pools(specs, drain_timeout_s))

    async def _change_pools(self, specs: Sequence[PoolSpec], drain_timeout_s: float) -> None:
        """The new pools are published before they start: front ends wait for them, while the old ones drain."""
        async with self._applying:
            going = [pool for pool in self._pools if pool.spec not in specs]
            kept = {pool.spec.name: pool for pool in self._pools if pool not in going}
            self._pools = [kept.get(spec.name) or self._make_pool(spec) for spec in specs]
            self._publish()
            logger.info("pools that end: %s", ", ".join(pool.spec.name for pool in going) or "none")
            await asyncio.gather(*(pool.drain(drain_timeout_s) for pool in going))
            for pool in self._pools:
                if pool.spec.name not in kept:
                    pool.start()

    async def _remove_leftovers(self) -> None:
        """Placement groups outlive the actor that made them, and a kill that was cut short may have left one."""
        await asyncio.to_thread(remove_groups, self._prefix)

    async def _ensure_started(self) -> None:
        """A start that has failed, since Ray did not answer, is tried again with the next call."""
        self._num_silent = 0
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        running = await self._take_over()
        self._pools = [self._make_pool(spec) for spec in self._specs]
        for pool in self._pools:
            pool.start(running.get(pool.spec.name))

    @property
    def _prefix(self) -> str:
        """What the names of our placement groups begin with."""
        name = ray.get_runtime_context().get_actor_id() if self._home is None else self._home.name
        return f"tensorweave-{name}/"

    async def _take_over(self) -> dict[str, dict[int, ReadyGang]]:
        """The gangs of an earlier life that run as we would start them, by pool and slot. All others end."""
        running: dict[str, dict[int, ReadyGang]] = {}
        if self._home is None:
            await self._remove_leftovers()
            return running
        found = await find_running(self._prefix, self._specs, self._worker_class, self._home.namespace)
        for record, gang in found:
            running.setdefault(record.pool, {})[record.slot] = (gang, record.address)
        return running

    def _end_when_forgotten(self, home: Home) -> None:
        """On a thread, which also runs where nobody has ever called. Turns without a question are counted, not seconds:
        a host that stood still has heard nobody."""
        turn = threading.Event()
        while self._num_silent * _TURN_S < _LEASE_S:
            turn.wait(_TURN_S)
            self._num_silent += 1
        logger.warning("nobody has asked for %g s: the pools end", _LEASE_S)
        stop_supervisor(find_supervisor(home))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _make_pool(self, spec: PoolSpec) -> GangPool:
        namespace = None if self._home is None else self._home.namespace

        def launch(slot: int, epoch: int) -> Gang:
            gang_id = f"{spec.name}-{slot}.{epoch}-{secrets.token_hex(3)}"
            group = self._prefix + gang_id
            return Gang(
                *(spec.gang, self._worker_class, gang_id, epoch, group), pool=spec.name, slot=slot, namespace=namespace
            )

        return GangPool(spec, launch, self._publish)

    def _publish(self) -> None:
        """Wake everyone who waits; the event is replaced, so that nobody misses or repeats a change."""
        self._links.update([gang for pool in self._pools for gang in pool.ready])
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def _checked(pools: Sequence[PoolSpec]) -> tuple[PoolSpec, ...]:
    names = [pool.name for pool in pools]
    if len(set(names)) != len(names):
        raise ValueError(f"pool names must differ: {', '.join(names)}")
    return tuple(pools)


def start_supervisor(
    pools: Sequence[PoolSpec], worker_class: type[Any], *, lifeline: OwnLifeline | None = None
) -> ActorHandle[PoolSupervisor]:
    """Start the actor. It and all that it places end with `lifeline`; without one it ends with its creator, and the
    places are free again when the job ends. Ray must be up."""
    name, lifetime = (None, None) if lifeline is None else (lifeline.name, "detached")
    return _start(pools, worker_class, name, None, max_restarts=_MAX_RESTARTS, lifetime=lifetime)


def find_or_start_supervisor(
    home: Home, pools: Sequence[PoolSpec], worker_class: type[Any]
) -> ActorHandle[PoolSupervisor]:
    """The supervisor that lives there; a new one, detached, where there is none. Its pools are then those of whoever
    started it: see `apply`."""
    return _start(
        *(pools, worker_class, None, home),
        max_restarts=-1,
        name=home.name,
        namespace=home.namespace,
        lifetime="detached",
        get_if_exists=True,
        resources=dict(home.resources),
    )


def find_supervisor(home: Home) -> ActorHandle[PoolSupervisor]:
    """Raises ValueError where there is none. Blocks."""
    actor: ActorHandle[PoolSupervisor] = ray.get_actor(home.name, home.namespace)
    return actor


def _start(
    pools: Sequence[PoolSpec], worker_class: type[Any], lifeline: str | None, home: Home | None, **options: Any
) -> ActorHandle[PoolSupervisor]:
    actor: ActorHandle[PoolSupervisor] = (
        ray.remote(PoolSupervisor)
        .options(num_cpus=0, max_task_retries=0, max_concurrency=_MAX_WATCHERS, **options)
        .remote(tuple(pools), worker_class, lifeline, home)
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
