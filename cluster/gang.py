"""A gang: one tensor-parallel group of Ray actors, one a rank, in one placement group.

`Gang` places, starts, watches and kills it; the pool decides when. A gang is used once: any rank's death, hang or
failure ends it, and its successor has a higher epoch. Ray carries orders and heartbeats only.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.gang_record import GangRecord
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.hosts import Hosts
from tensorweave.cluster.memory_kills import kills_anywhere, kills_here
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.placement import NamedGroup, live_node_ids, live_nodes, place, placed_on
from tensorweave.cluster.protocol import GangAddress, KvSource, LinkMeasurement
from tensorweave.cluster.rank_link import GangLink
from tensorweave.cluster.rank_processes import RankProcesses
from tensorweave.cluster.rank_watch import STARTING_HEARTBEAT_TIMEOUT_S, RankWatch, first_line, why_dead
from tensorweave.cluster.ranks import RankOrder, RankPlace, RankReport, RankStarted, describe_phases
from tensorweave.cluster.versions import Versions, explain_mix

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STOP_TIMEOUT_S: Final = 5.0
_MEASURE_TIMEOUT_S: Final = 20.0
_CREATED_TOLERANCE_S: Final = 0.1
_LONG_START_S: Final = 15.0
_LEASE_S: Final = 120.0
"""How long a detached rank serves on without a heartbeat: time for Ray to start its supervisor again."""


class Gang:
    """One incarnation. Call `start`, then `watch` until it returns, and `kill` in any case.

    With a `namespace` the ranks outlive the process that started them, for `_LEASE_S`: within it, a successor finds
    them by name and goes on with `resume`. Without, they die with it.
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
    ) -> None:
        self.gang_id = gang_id
        self.epoch = epoch
        self.spec = spec
        self._worker_class = worker_class
        self._group_name = group_name or gang_id
        self._pool = pool
        self._slot = slot
        self._namespace = namespace
        self._secret = secrets.token_hex(16)
        self._kv_secret = secrets.token_hex(16)
        self._group: PlacementGroup | None = None
        self._actors: list[ActorHandle[Any]] = []
        self._processes = RankProcesses((), live_node_ids)
        self._places: Sequence[RankPlace] = ()
        self._node_ips: Mapping[str, str] = {}
        self._watch = RankWatch((), self._name, spec.hang_timeout_s)
        self._link: GangLink | None = None
        self._start_began_s: float | None = None

    @classmethod
    def resume(cls, record: GangRecord, worker_class: type[Any], group: NamedGroup, namespace: str) -> Self:
        """A gang that runs already. Raises ValueError where one of its ranks has gone. Blocks."""
        address, spec = record.address, record.spec
        gang = cls(spec, worker_class, address.gang_id, address.epoch, group.name, namespace=namespace)
        gang._group = group.group
        gang._actors = [ray.get_actor(rank_name(group.name, rank), namespace) for rank in range(len(record.places))]
        gang._places, gang._node_ips = record.places, record.node_ips
        gang._link = None if record.link is None else GangLink(gang.gang_id, record.link)
        gang._watch = RankWatch(gang._actors, gang._name, spec.hang_timeout_s, gang._note_report)
        return gang

    async def start(self) -> GangAddress:
        """Place, start and join all ranks.

        Raises:
            NoRoom: no room in time. WorkerLost: a rank died, or was not up within `start_timeout_s`.
            ValueError: the ranks refuse their arguments; starting again is no use.
        """
        spec = self.spec
        size = spec.mesh.size
        is_detached = self._namespace is not None
        self._group = await place(spec.bundle, size, spec.place_timeout_s, self._group_name, is_detached=is_detached)
        self._processes = RankProcesses(await asyncio.to_thread(placed_on, self._group), live_node_ids)
        self._actors = [self._create_actor(rank) for rank in range(size)]
        self._start_began_s = time.monotonic()
        try:
            async with asyncio.timeout(spec.start_timeout_s):
                return await self._start_ranks()
        except TimeoutError:
            at = self._describe_start()
            raise WorkerLost(f"gang {self.gang_id} did not start within {spec.start_timeout_s:g} s: {at}") from None
        except RayActorError as error:
            why = why_dead(error) + await kills_anywhere(self._places)
            raise WorkerLost(f"gang {self.gang_id}: a rank died while starting ({why})") from error
        except RayError as error:
            raise _start_error(self.gang_id, error) from error
        finally:
            self._start_began_s = None

    async def _start_ranks(self) -> GangAddress:
        lease_s = None if self._namespace is None else _LEASE_S
        self._places = await self._processes.until_up([actor.prepare.remote(lease_s) for actor in self._actors])
        self._node_ips = {node["NodeID"]: node["NodeManagerAddress"] for node in await asyncio.to_thread(live_nodes)}
        await self._check_versions()
        hosts = Hosts.choose(self._places, self._node_ips)
        starting = asyncio.ensure_future(
            _gather([self._start_rank(rank, self._order(rank, hosts)) for rank in range(len(self._actors))])
        )
        self._watch = RankWatch(self._actors, self._name, self.spec.hang_timeout_s, self._note_report)
        watching = asyncio.ensure_future(self._watch.until_fault(STARTING_HEARTBEAT_TIMEOUT_S))
        try:
            await asyncio.wait({starting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                why = watching.result() + await kills_anywhere(self._places)
                raise WorkerLost(f"gang {self.gang_id} while starting: {why}")
            started: list[RankStarted] = starting.result()
        finally:
            starting.cancel()
            watching.cancel()
        if started[0].link is not None:
            self._link = GangLink(self.gang_id, started[0].link)
        leader = started[0].leader
        assert leader is not None, "rank 0 is the leader"
        address = GangAddress(
            self.gang_id, self.epoch, self.spec.role, hosts.listen, leader.port, self._secret, leader.info
        )
        address = dataclasses.replace(address, kv_source=self._kv_source(started))
        if self._namespace is not None:
            places = tuple(self._places)
            link = started[0].link
            record = GangRecord(self._pool, self._slot, self.spec, address, places, self._node_ips, link)
            await self._actors[0].keep_record.remote(record)
        return address

    async def _check_versions(self) -> None:
        """Raises ValueError where a rank's host has another version of us: another try would fare no better."""
        versions: dict[str, Versions | None] = {}
        for rank, actor in enumerate(self._actors):
            try:
                versions[self._name(rank)] = Versions.from_wire(await actor.versions.remote())
            except RayTaskError:  # it knows no such method
                versions[self._name(rank)] = None
        if mix := explain_mix(Versions.here(), versions):
            raise ValueError(mix)

    async def _start_rank(self, rank: int, order: RankOrder) -> RankStarted:
        """Where there are several hosts, an error names the one that it comes from."""
        try:
            started: RankStarted = await self._actors[rank].start.remote(order)
            return started
        except RayActorError:
            raise
        except RayError as error:
            where = f"{self._name(rank)}: " if len(self._node_ips) > 1 else ""
            raise _start_error(self.gang_id, error, where) from error

    def _kv_source(self, started: Sequence[RankStarted]) -> KvSource | None:
        """Where other gangs pull this one's KV, if it gives any away."""
        endpoints = tuple(rank.kv_endpoint for rank in started if rank.kv_endpoint is not None)
        if not endpoints:
            return None
        fingerprint = started[0].kv_fingerprint
        for number, rank in enumerate(started):
            if rank.kv_endpoint is None or rank.kv_fingerprint != fingerprint:
                raise WorkerLost(f"gang {self.gang_id}: ranks 0 and {number} differ in how they keep KV")
        return KvSource(self.gang_id, endpoints, fingerprint, self._kv_secret)

    def _create_actor(self, rank: int) -> ActorHandle[Any]:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
        actor: ActorHandle[Any] = (
            ray.remote(self._worker_class)
            .options(
                num_cpus=self.spec.bundle.get("CPU", 0),
                num_gpus=self.spec.gpus_per_rank,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=strategy,
                runtime_env=self.spec.runtime_env,
                **self._lifetime(rank),
            )
            .remote(**self.spec.worker_options)
        )
        return actor

    def _lifetime(self, rank: int) -> dict[str, str]:
        if self._namespace is None:
            return {}
        return {"lifetime": "detached", "name": rank_name(self._group_name, rank), "namespace": self._namespace}

    def _name(self, rank: int) -> str:
        return f"rank {rank} (pid {self._places[rank].pid} on {self._ip(self._places[rank])})"

    def _ip(self, place: RankPlace) -> str:
        return self._node_ips[place.node_id]

    def _order(self, rank: int, hosts: Hosts) -> RankOrder:
        ranks_on = collections.Counter(place.node_id for place in self._places)
        return RankOrder(
            gang_id=self.gang_id,
            place=MeshRank(rank, self.spec.mesh),
            args=self.spec.args,
            leader=self._actors[0] if rank else None,
            interface_ip=hosts.peers[rank],
            listen_host=hosts.listen,
            transfer_host=hosts.reached[rank],
            num_ranks_here=ranks_on[self._places[rank].node_id],
            has_gpu=self.spec.gpus_per_rank > 0,
            start_timeout_s=self.spec.start_timeout_s,
            model_digest=self.spec.model_digest,
            secret=self._secret,
            kv_secret=self._kv_secret,
        )

    # ---- supervision

    async def watch(self) -> str:
        """Returns when the gang must end, and says why: at most about 5 s, or the hang timeout, after the fault."""
        return await self._watch.until_fault() + kills_here(self._places)

    def _note_report(self, rank: int, report: RankReport) -> None:
        if rank == 0 and self._link is not None and report.traffic is not None:
            self._link.note(report.traffic)

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        """What the way from that gang to this one carries."""
        try:
            async with asyncio.timeout(_MEASURE_TIMEOUT_S):
                link: LinkMeasurement = await self._actors[0].measure_link.remote(source)
                return link
        except (TimeoutError, RayError) as error:
            return LinkMeasurement(0.0, 0.0, f"{type(error).__name__}: {first_line(error)}")

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """References to callables, by name, which Ray hands to every rank; None takes one away. Raises WorkerLost, and
        ValueError where a rank cannot load one."""
        try:
            for name, reference in processors.items():
                await _gather([actor.set_logits_processor.remote(name, reference) for actor in self._actors])
        except RayActorError as error:
            raise WorkerLost(f"gang {self.gang_id}: a rank died ({first_line(error)})") from error
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ValueError(f"a logits processor cannot be loaded by the ranks: {first_line(cause)}") from error

    async def drain(self, timeout_s: float) -> None:
        """Let open requests end, refuse new ones; then the ranks stop. Gives up at the timeout: `kill` follows."""
        try:
            async with asyncio.timeout(timeout_s + _STOP_TIMEOUT_S):
                if self._actors:
                    await self._actors[0].drain.remote(timeout_s)
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await _gather([actor.stop.remote() for actor in self._actors])
        except (TimeoutError, RayError) as error:
            logger.warning("gang %s: drain cut short: %s", self.gang_id, first_line(error))

    async def kill(self) -> None:
        """SIGKILL to all ranks, and the placement group goes. Idempotent."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for rank in self._watch.mute:
            self._kill_here(self._places[rank])
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(remove_placement_group, group)

    def _kill_here(self, place: RankPlace) -> None:
        """Ray takes 5 s to kill a stopped process; on our own node we need not wait for it."""
        if place.node_id != ray.get_runtime_context().get_node_id():
            return
        try:
            process = psutil.Process(place.pid)
            if abs(process.create_time() - place.created_s) < _CREATED_TOLERANCE_S:
                os.kill(place.pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return

    def describe(self) -> dict[str, Any]:
        """For health pages: where each rank sits and how it fares."""
        ranks = [
            {
                "rank": rank,
                "node_ip": self._ip(place),
                "pid": place.pid,
                "progress_age_s": report.progress_age_s,
                "num_requests": report.num_requests,
                "num_open_files": report.num_open_files,
                "gauges": report.gauges,
            }
            for rank, place in enumerate(self._places)
            for report in (self._watch.report(rank),)
        ]
        link = {} if self._link is None else {"link": self._link.describe()}
        start = self._describe_start()
        return {"gang_id": self.gang_id, "epoch": self.epoch, "ranks": ranks, "starting": start, **link}

    def _describe_start(self) -> str:
        """What its ranks are at, once a start takes longer than most."""
        began_s = self._start_began_s
        if began_s is None or time.monotonic() - began_s < _LONG_START_S:
            return ""
        phases = [(self._ip(place), self._watch.report(rank).phase) for rank, place in enumerate(self._places)]
        return describe_phases(phases or self._processes.phases())


def rank_name(group_name: str, rank: int) -> str:
    """Of a detached rank's actor."""
    return f"{group_name}-{rank}"


async def _gather(references: Sequence[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*references))


def _start_error(gang_id: str, error: RayError, where: str = "") -> Exception:
    """A ValueError on a rank is the user's, whatever Ray wrapped it in; everything else is the world's."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, NotReady | WorkerLost):
        return cause
    if isinstance(cause, ValueError):
        return ValueError(f"{where}{cause}")
    why = f"{type(cause or error).__name__}: {first_line(cause or error)}"
    return WorkerLost(f"gang {gang_id} failed to start: {where}{why}")
