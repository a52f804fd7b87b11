"""`Gang`: the Ray actors of one model, one per rank, in one placement group.

It places, starts, watches and kills the actors; the pool decides when. A gang is used once: any rank's death, hang or
failure ends it, and its successor has a higher epoch. Only start orders and heartbeats are sent through Ray.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from tensorweave.cluster.adapter_registry import AdapterRecord
from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.gang_record import GangRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.gang_start import GangStart
from tensorweave.cluster.memory_kills import describe_kills, describe_local_kills
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.placement import NamedGroup, live_node_ids, live_nodes, place, placed_on
from tensorweave.cluster.placement_rule import PoolPlaces
from tensorweave.cluster.pool_spec import PoolPlan
from tensorweave.cluster.protocol import Adapter, GangAddress, KvSource, LinkMeasurement
from tensorweave.cluster.rank_actors import create_rank_actor, rank_name, start_error
from tensorweave.cluster.rank_link import RankLinkMonitor
from tensorweave.cluster.rank_places import RankPlaces
from tensorweave.cluster.rank_processes import RankProcesses
from tensorweave.cluster.rank_watch import RankWatch, death_reason, first_line, result_within
from tensorweave.cluster.ranks import RankReport, RankStarted, describe_durations, describe_phases

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STOP_TIMEOUT_S: Final = 5.0
_KEPT_TIMEOUT_S: Final = 30.0
"""Without an answer, adapters that were loaded while the service ran would be forgotten."""
_MEASURE_TIMEOUT_S: Final = 20.0
_ADAPTER_TIMEOUT_S: Final = 150.0
_LONG_START_S: Final = 15.0
_LEASE_S: Final = 120.0
"""How long a detached rank runs without a heartbeat: time for Ray to restart its supervisor."""


class Gang:
    """Call `start`, then `watch` until it returns, and `kill` in any case.

    With a `namespace` the ranks outlive the process that started them for `_LEASE_S`, within which a successor may find
    them and `resume` the gang. Without one they end with that process.
    """

    def __init__(
        self,
        spec: GangSpec,
        worker_class: type[Any],
        gang_id: str,
        epoch: int,
        group_name: str = "",
        *,
        pool: str = "",
        slot: int = 0,
        namespace: str | None = None,
        places: PoolPlaces | None = None,
    ) -> None:
        self.gang_id = gang_id
        self.epoch = epoch
        self.spec = spec
        self._worker_class = worker_class
        self._group_name = group_name or gang_id
        self._pool = pool
        self._slot = slot
        self._namespace = namespace
        self._pool_places = places or PoolPlaces(self._group_name, spec.placement)
        self._group: PlacementGroup | None = None
        self._actors: list[ActorHandle[Any]] = []
        self._processes = RankProcesses((), live_node_ids)
        self._places = RankPlaces()
        self._watch = RankWatch((), self._places.name, spec.hang_timeout_s)
        self._link: RankLinkMonitor | None = None
        self._start_began_s: float | None = None
        self._record: GangRecord | None = None

    @classmethod
    def resume(cls, record: GangRecord, worker_class: type[Any], group: NamedGroup, namespace: str) -> Self:
        """A gang that is running already. Raises ValueError if one of its ranks has ended. Blocks."""
        address, spec = record.address, record.spec
        gang = cls(spec, worker_class, address.gang_id, address.epoch, group.name, namespace=namespace)
        gang._group = group.group
        gang._actors = [ray.get_actor(rank_name(group.name, rank), namespace) for rank in range(len(record.places))]
        gang._places = RankPlaces(record.places, record.node_ips)
        gang._link = None if record.link is None else RankLinkMonitor(gang.gang_id, record.link)
        gang._watch = RankWatch(gang._actors, gang._places.name, spec.hang_timeout_s, gang._note_report)
        gang._record = record
        return gang

    async def start(self) -> GangAddress:
        """Place, start and join all ranks.

        Raises:
            InsufficientResources: the ranks were not placed in time.
            WorkerLost: a rank died, or was not ready within `start_timeout_s`.
            ValueError: the ranks refuse their arguments; another attempt would fail too.
        """
        spec = self.spec
        size = spec.mesh.size
        is_detached = self._namespace is not None
        wanted = (spec.bundle, size, spec.place_timeout_s, self._group_name)
        self._group = await place(*wanted, places=self._pool_places, is_detached=is_detached)
        self._processes = RankProcesses(await asyncio.to_thread(placed_on, self._group), live_node_ids)
        names = [rank_name(self._group_name, rank) for rank in range(size)]
        self._actors = [
            create_rank_actor(spec, self._worker_class, self._group, rank, name, self._namespace)
            for rank, name in enumerate(names)
        ]
        self._start_began_s = time.monotonic()
        try:
            async with asyncio.timeout(spec.start_timeout_s):
                return await self._start_ranks()
        except TimeoutError:
            phases = self._describe_start()
            raise WorkerLost(f"gang {self.gang_id} did not start within {spec.start_timeout_s:g} s: {phases}") from None
        except RayActorError as error:
            why = death_reason(error) + await describe_kills(self._places.places)
            raise WorkerLost(f"gang {self.gang_id}: a rank died while starting ({why})") from error
        except RayError as error:
            raise start_error(self.gang_id, error) from error
        finally:
            self._start_began_s = None

    async def _start_ranks(self) -> GangAddress:
        lease_s = None if self._namespace is None else _LEASE_S
        places = await self._processes.until_up([actor.prepare.remote(lease_s) for actor in self._actors])
        node_ips = {node["NodeID"]: node["NodeManagerAddress"] for node in await asyncio.to_thread(live_nodes)}
        self._places = RankPlaces(places, node_ips)
        if scattered := self._places.scattered_stages(self.spec.mesh):
            logger.warning("gang %s: pipeline stages %s have ranks on several hosts each", self.gang_id, scattered)
        start = GangStart(self.gang_id, self.epoch, self.spec, self._actors, self._places)
        await start.check()
        self._watch = RankWatch(self._actors, self._places.name, self.spec.hang_timeout_s, self._note_report)
        started = await self._run_watched(start)
        logger.info("gang %s has started: %s", self.gang_id, describe_durations(started))
        if started[0].link is not None:
            self._link = RankLinkMonitor(self.gang_id, started[0].link)
        address = start.address_of(started)
        where = (self._places.places, self._places.node_ips)
        self._record = GangRecord(self._pool, self._slot, self.spec, address, *where, started[0].link)
        await self._actors[0].keep_record.remote(self._record)
        return address

    async def _run_watched(self, start: GangStart) -> Sequence[RankStarted]:
        """Raises WorkerLost as soon as a rank has died, whatever the others still wait for."""
        starting = asyncio.ensure_future(start.run())
        watching = asyncio.ensure_future(self._watch.until_fault_while_starting())
        try:
            await asyncio.wait({starting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                why = watching.result() + await describe_kills(self._places.places)
                raise WorkerLost(f"gang {self.gang_id} while starting: {why}")
            return starting.result()
        finally:
            starting.cancel()
            watching.cancel()

    # ---- supervision

    async def watch(self) -> str:
        """Return why the gang must end, at most about 5 s, or the hang timeout, after the fault."""
        return await self._watch.until_fault() + describe_local_kills(self._places.places)

    def _note_report(self, rank: int, report: RankReport) -> None:
        if rank == 0 and self._link is not None and report.traffic is not None:
            self._link.note(report.traffic)

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        """Measure the link from that gang to this one."""
        try:
            async with asyncio.timeout(_MEASURE_TIMEOUT_S):
                link: LinkMeasurement = await self._actors[0].measure_link.remote(source)
                return link
        except (TimeoutError, RayError) as error:
            return LinkMeasurement(0.0, 0.0, f"{type(error).__name__}: {first_line(error)}")

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """Set logits processors, by name, on every rank. `processors` are references; None removes one. Raises
        WorkerLost, and ValueError if a rank cannot load one."""
        try:
            for name, reference in processors.items():
                await _gather([actor.set_logits_processor.remote(name, reference) for actor in self._actors])
        except RayActorError as error:
            raise WorkerLost(f"gang {self.gang_id}: a rank died ({first_line(error)})") from error
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ValueError(f"a logits processor cannot be loaded by the ranks: {first_line(cause)}") from error

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Return once all ranks have the LoRA adapter of this directory in memory. Raises WorkerLost or NotReady, and
        ValueError if a rank refuses it."""
        try:
            async with asyncio.timeout(_ADAPTER_TIMEOUT_S):
                adapter: Adapter = await self._actors[0].load_adapter.remote(name, path)
                return adapter
        except TimeoutError:
            raise NotReady(
                f"gang {self.gang_id}: adapter {name!r} is not loaded within {_ADAPTER_TIMEOUT_S:g} s"
            ) from None
        except RayActorError as error:
            raise WorkerLost(f"gang {self.gang_id}: a rank died ({first_line(error)})") from error
        except RayError as error:
            raise start_error(self.gang_id, error) from error

    async def keep_adapters(self, record: AdapterRecord) -> None:
        """Let rank 0 keep this for a supervisor that takes the gang over. Raises WorkerLost."""
        await self._ask_leader("keep_adapters", record)

    async def kept_adapters(self) -> AdapterRecord:
        """What rank 0 keeps; an empty record if it does not answer."""
        try:
            record: AdapterRecord = await result_within(self._actors[0].kept_adapters.remote(), _KEPT_TIMEOUT_S)
            return record
        except (TimeoutError, RayError) as error:
            logger.warning("gang %s does not tell of its adapters (%s)", self.gang_id, first_line(error))
            return AdapterRecord()

    async def keep_plan(self, plan: PoolPlan) -> None:
        """Let rank 0 keep this for a supervisor that takes the gang over. Raises WorkerLost."""
        await self._ask_leader("keep_plan", plan)

    async def quiesce(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait for the open ones and until their KV has been fetched. Return whether none is
        left after `timeout_s`. Raises WorkerLost."""
        is_idle: bool = await self._ask_leader("drain", timeout_s, timeout_s=timeout_s + _STOP_TIMEOUT_S)
        return is_idle

    async def reopen(self) -> None:
        """Take new requests again. Raises WorkerLost."""
        await self._ask_leader("reopen")

    async def reassign(self, pool: str, slot: int, spec: GangSpec) -> GangAddress:
        """Belong to another pool from now on, and take requests again. `spec` may differ in the role, and in how long
        things may take. Raises WorkerLost."""
        assert self._record is not None, "only gangs that have started change their pool"
        address = dataclasses.replace(self._record.address, role=spec.role)
        self._record = dataclasses.replace(self._record, pool=pool, slot=slot, spec=spec, address=address)
        self.spec = spec
        await self._ask_leader("keep_record", self._record)
        await self.reopen()
        return address

    async def _ask_leader(self, method: str, *arguments: Any, timeout_s: float = _STOP_TIMEOUT_S) -> Any:
        """Raises WorkerLost."""
        try:
            return await result_within(getattr(self._actors[0], method).remote(*arguments), timeout_s)
        except (TimeoutError, RayError) as error:
            raise WorkerLost(f"gang {self.gang_id}: rank 0 does not answer ({first_line(error)})") from error

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the open ones, then stop the ranks. Returns at the timeout; `kill` follows."""
        try:
            async with asyncio.timeout(timeout_s + _STOP_TIMEOUT_S):
                if self._actors:
                    await self._actors[0].drain.remote(timeout_s)
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await _gather([actor.stop.remote() for actor in self._actors])
        except (TimeoutError, RayError) as error:
            logger.warning("gang %s: drain cut short: %s", self.gang_id, first_line(error))

    async def kill(self) -> None:
        """Kill all ranks and remove the placement group. Idempotent."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for rank in self._watch.unresponsive:
            self._places.kill_if_local(rank)
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(remove_placement_group, group)

    def describe(self) -> dict[str, Any]:
        """For health pages: where each rank runs, and its last report."""
        ranks = [
            {
                "rank": rank,
                "stage": MeshRank(rank, self.spec.mesh).pipeline,
                "node_ip": ip,
                "pid": place.pid,
                "progress_age_s": report.progress_age_s,
                "num_requests": report.num_requests,
                "num_open_files": report.num_open_files,
                "gauges": report.gauges,
            }
            for rank, (place, ip) in enumerate(zip(self._places.places, self._places.ips(), strict=True))
            for report in (self._watch.report(rank),)
        ]
        link = {} if self._link is None else {"link": self._link.describe()}
        start = self._describe_start()
        return {"gang_id": self.gang_id, "epoch": self.epoch, "ranks": ranks, "starting": start, **link}

    def _describe_start(self) -> str:
        """The phases of its ranks, once a start takes longer than usual."""
        began_s = self._start_began_s
        if began_s is None or time.monotonic() - began_s < _LONG_START_S:
            return ""
        phases = [(ip, self._watch.report(rank).phase) for rank, ip in enumerate(self._places.ips())]
        return describe_phases(phases or self._processes.phases())


async def _gather(references: Sequence[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*references))
