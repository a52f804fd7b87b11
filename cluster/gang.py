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
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, TypeVar

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.gang_link import GangLink
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.hosts import Hosts
from tensorweave.cluster.memory_kills import kills_anywhere, kills_here, says_memory
from tensorweave.cluster.placement import live_nodes, place
from tensorweave.cluster.protocol import GangAddress, KvRoad, KvSource
from tensorweave.cluster.ranks import RankOrder, RankPlace, RankReport, RankStarted
from tensorweave.cluster.versions import Versions, explain_mix

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_INTERVAL_S: Final = 1.0
HEARTBEAT_TIMEOUT_S: Final = 4.0
STARTING_HEARTBEAT_TIMEOUT_S: Final = 30.0
"""Importing and loading may hold a rank's interpreter for seconds."""
_STOP_TIMEOUT_S: Final = 5.0
_MEASURE_TIMEOUT_S: Final = 20.0
_CREATED_TOLERANCE_S: Final = 0.1
_BEAT_S: Final = 0.25


class Gang:
    """One incarnation. Call `start`, then `watch` until it returns, and `kill` in any case."""

    def __init__(self, spec: GangSpec, worker_class: type[Any], gang_id: str, epoch: int, group_name: str = "") -> None:
        self.gang_id = gang_id
        self.epoch = epoch
        self.spec = spec
        self._worker_class = worker_class
        self._group_name = group_name or gang_id
        self._secret = secrets.token_hex(16)
        self._kv_secret = secrets.token_hex(16)
        self._group: PlacementGroup | None = None
        self._actors: list[ActorHandle[Any]] = []
        self._places: list[RankPlace] = []
        self._node_ips: dict[str, str] = {}
        self._reports: dict[int, RankReport] = {}
        self._mute: set[int] = set()
        self._link: GangLink | None = None

    async def start(self) -> GangAddress:
        """Place, start and join all ranks.

        Raises:
            NotReady: no room in time. WorkerLost: a rank died, or was not up within `start_timeout_s`.
            ValueError: the ranks refuse their arguments; starting again is no use.
        """
        spec = self.spec
        size = spec.tensor_parallel_size
        self._group = await place(spec.bundle, size, spec.place_timeout_s, self._group_name)
        self._actors = [self._create_actor(rank) for rank in range(size)]
        try:
            async with asyncio.timeout(spec.start_timeout_s):
                return await self._start_ranks()
        except TimeoutError:
            raise WorkerLost(f"gang {self.gang_id} did not start within {spec.start_timeout_s:g} s") from None
        except RayActorError as error:
            why = _why_dead(error) + await kills_anywhere(self._places)
            raise WorkerLost(f"gang {self.gang_id}: a rank died while starting ({why})") from error
        except RayError as error:
            raise _start_error(self.gang_id, error) from error

    async def _start_ranks(self) -> GangAddress:
        self._places = await _gather([actor.prepare.remote() for actor in self._actors])
        self._node_ips = {node["NodeID"]: node["NodeManagerAddress"] for node in await asyncio.to_thread(live_nodes)}
        await self._check_versions()
        hosts = Hosts.choose(self._places, self._node_ips)
        starting = asyncio.ensure_future(
            _gather([self._start_rank(rank, self._order(rank, hosts)) for rank in range(len(self._actors))])
        )
        watching = asyncio.ensure_future(self._watch(STARTING_HEARTBEAT_TIMEOUT_S))
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
        return dataclasses.replace(address, kv_source=self._kv_source(started))

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
            )
            .remote(**self.spec.worker_options)
        )
        return actor

    def _name(self, rank: int) -> str:
        return f"rank {rank} (pid {self._places[rank].pid} on {self._ip(self._places[rank])})"

    def _ip(self, place: RankPlace) -> str:
        return self._node_ips[place.node_id]

    def _order(self, rank: int, hosts: Hosts) -> RankOrder:
        ranks_on = collections.Counter(place.node_id for place in self._places)
        return RankOrder(
            gang_id=self.gang_id,
            rank=rank,
            size=len(self._actors),
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
        return await self._watch(HEARTBEAT_TIMEOUT_S) + kills_here(self._places)

    async def _watch(self, timeout_s: float) -> str:
        watchers = [asyncio.create_task(self._watch_rank(rank, timeout_s)) for rank in range(len(self._actors))]
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            return "; ".join(watcher.result() for watcher in done)
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _watch_rank(self, rank: int, timeout_s: float) -> str:
        """Standstill is a fault when two reports in a row say so."""
        name = self._name(rank)
        was_still = False
        while True:
            try:
                report: RankReport = await _in_time(self._actors[rank].heartbeat.remote(), timeout_s)
            except TimeoutError:
                self._mute.add(rank)
                return f"{name} has not answered for {timeout_s:g} s"
            except RayError as error:
                return f"{name} died: {_why_dead(error)}"
            self._reports[rank] = report
            if rank == 0 and self._link is not None and report.traffic is not None:
                self._link.note(report.traffic)
            standstill = report.standstill(self.spec.hang_timeout_s)
            if fault := report.fault or (was_still and standstill):
                return f"{name}: {fault}"
            was_still = standstill is not None
            await asyncio.sleep(_BEAT_S if was_still else HEARTBEAT_INTERVAL_S)

    async def measure_road(self, source: KvSource) -> KvRoad:
        """What the way from that gang to this one carries."""
        try:
            async with asyncio.timeout(_MEASURE_TIMEOUT_S):
                road: KvRoad = await self._actors[0].measure_road.remote(source)
                return road
        except (TimeoutError, RayError) as error:
            return KvRoad(0.0, 0.0, f"{type(error).__name__}: {_first_line(error)}")

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None:
        """References to callables, by name, which Ray hands to every rank; None takes one away. Raises WorkerLost, and
        ValueError where a rank cannot load one."""
        try:
            for name, reference in processors.items():
                await _gather([actor.set_logits_processor.remote(name, reference) for actor in self._actors])
        except RayActorError as error:
            raise WorkerLost(f"gang {self.gang_id}: a rank died ({_first_line(error)})") from error
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ValueError(f"a logits processor cannot be loaded by the ranks: {_first_line(cause)}") from error

    async def drain(self, timeout_s: float) -> None:
        """Let open requests end, refuse new ones; then the ranks stop. Gives up at the timeout: `kill` follows."""
        try:
            async with asyncio.timeout(timeout_s + _STOP_TIMEOUT_S):
                if self._actors:
                    await self._actors[0].drain.remote(timeout_s)
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await _gather([actor.stop.remote() for actor in self._actors])
        except (TimeoutError, RayError) as error:
            logger.warning("gang %s: drain cut short: %s", self.gang_id, _first_line(error))

    async def kill(self) -> None:
        """SIGKILL to all ranks, and the placement group goes. Idempotent."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for rank in self._mute:
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
            for report in (self._reports.get(rank, RankReport()),)
        ]
        link = {} if self._link is None else {"link": self._link.describe()}
        return {"gang_id": self.gang_id, "epoch": self.epoch, "ranks": ranks, **link}


async def _in_time(reference: Awaitable[T], timeout_s: float) -> T:
    """Its result, or TimeoutError. Counts beats in vain, not seconds: if our own loop stood still, nobody else is
    to blame."""
    asked = asyncio.ensure_future(reference)
    try:
        for _ in range(round(timeout_s / _BEAT_S)):
            done, _ = await asyncio.wait({asked}, timeout=_BEAT_S)
            if done:
                return asked.result()
        raise TimeoutError
    finally:
        asked.cancel()


async def _gather(references: Sequence[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*references))


def _start_error(gang_id: str, error: RayError, where: str = "") -> Exception:
    """A ValueError on a rank is the user's, whatever Ray wrapped it in; everything else is the world's."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, NotReady | WorkerLost):
        return cause
    if isinstance(cause, ValueError):
        return ValueError(f"{where}{cause}")
    why = f"{type(cause or error).__name__}: {_first_line(cause or error)}"
    return WorkerLost(f"gang {gang_id} failed to start: {where}{why}")


def _why_dead(error: RayError) -> str:
    return "its host ran out of memory, and Ray killed it" if says_memory(error) else _first_line(error).rstrip(".")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
