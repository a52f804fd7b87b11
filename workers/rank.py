"""The actor of one rank: it builds the executor, serves it on a socket (rank 0) and answers heartbeats.

`RankWorker` is a plain class; the gang makes it a Ray actor. Its methods run on the actor's event loop, everything slow
on threads, so that heartbeats are answered while a model loads or a step computes. The engine's modules are imported on
start, so that the supervisor, which needs this class only to launch it, does not load torch.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import psutil
import ray
from ray.exceptions import ActorUnavailableError, RayError

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.adapter_registry import AdapterRecord
from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.file_limit import count_open_files, raise_file_limit
from tensorweave.cluster.host_memory import oom_kills
from tensorweave.cluster.host_networks import address_in, interface_addresses
from tensorweave.cluster.log_setup import LogSettings, set_up_logging
from tensorweave.cluster.pool_spec import PoolPlan
from tensorweave.cluster.protocol import KvSource, LinkMeasurement
from tensorweave.cluster.rank_watch import first_line
from tensorweave.cluster.ranks import LeaderPlace, LinkRate, RankOrder, RankPlace, RankReport, RankStarted, Traffic
from tensorweave.cluster.versions import Versions
from tensorweave.workers.gang.rendezvous import CallStore, RendezvousStore, call_on_loop
from tensorweave.workers.rank_process import ProcessGuard, die_with_parent
from tensorweave.workers.start_log import StartLog

if TYPE_CHECKING:
    from tensorweave.cluster.gang_record import GangRecord
    from tensorweave.cluster.llm_args import TorchLlmArgs
    from tensorweave.workers.executor.executor import PyExecutor
    from tensorweave.workers.gang.comm import Comm, GroupComm
    from tensorweave.workers.leader.server import LeaderServer
    from tensorweave.workers.sampling.logits_processors import LogitsProcessor

logger = logging.getLogger(__name__)

_CALL_SLACK_S: Final = 10.0
_EVENT_BUFFER_SIZE: Final = 1 << 16
"""KV events kept between two reads of the leader, a quarter of a second apart at most: thousands of full steps."""
_SWITCH_INTERVAL_S: Final = 0.001
"""How long one thread may keep another waiting for the interpreter: Python's own 5 ms would show in token times."""


class RankWorker:
    """One rank of a gang, from `prepare` to `stop`; used once."""

    def __init__(self, log: LogSettings | None = None) -> None:
        self._log_settings = log
        self._set_up_log("rank")
        self._executor: PyExecutor | None = None
        self._leader: LeaderServer | None = None
        self._rendezvous = RendezvousStore()
        self._group: GroupComm | None = None
        self._measured = Traffic()
        self._phase = ""
        self._log = StartLog(self._note_phase)
        self._record: GangRecord | None = None
        self._adapters = AdapterRecord()
        self._plan = PoolPlan()
        self._guard = ProcessGuard(self._has_failed, _remove_placement_group)

    async def prepare(self, lease_s: float | None = None) -> RankPlace:
        """Report where this rank is. From now on its process ends with its node's Ray and, if `lease_s` is given, that
        long after the last heartbeat."""
        die_with_parent()
        raise_file_limit()
        self._loop = asyncio.get_running_loop()
        self._guard.start(lease_s)
        return RankPlace(
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            created_s=psutil.Process().create_time(),
            oom_kills=oom_kills(),
        )

    async def versions(self) -> list[Any]:
        """`Versions` of this process, in plain types: the caller may have another version."""
        return Versions.here().to_wire()

    async def rendezvous(self, verb: str, *arguments: Any) -> Any:
        """Rank 0 only: a call of `RendezvousStore.call` by another rank."""
        return await self._rendezvous.call(verb, *arguments)

    async def start(self, order: RankOrder) -> RankStarted:
        """Load the model and start the step loop; return once requests can come.

        Raises:
            ValueError: the arguments or the model's files are wrong.
        """
        self._set_up_log(f"rank {order.place.rank} of {order.gang_id}")
        return await asyncio.to_thread(self._start, order)

    async def keep_record(self, record: GangRecord) -> None:
        """Rank 0 only: keep what a supervisor that takes the gang over must know."""
        self._record = record

    async def record(self) -> GangRecord | None:
        """None before the gang is ready."""
        return self._record

    async def heartbeat(self) -> RankReport:
        self._guard.note_heartbeat()
        executor = self._executor
        num_open, max_open = count_open_files()
        if executor is None:
            return RankReport(phase=self._phase, num_open_files=num_open, max_open_files=max_open)
        return RankReport(
            progress_age_s=executor.heartbeat(),
            waits_for_stage=executor.waits_for_stage,
            is_alive=executor.is_alive,
            failure=None if executor.failure is None else executor.failure.message,
            num_requests=executor.num_requests,
            gauges=executor.gauges(),
            num_open_files=num_open,
            max_open_files=max_open,
            traffic=None if self._group is None else self._group.traffic.since(self._measured),
        )

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        """Rank 0 of a gang that fetches KV: measure the link from the gang at `source`."""
        assert self._executor is not None, "only ranks that have started measure links"
        return await asyncio.to_thread(self._executor.measure_link, source)

    async def set_logits_processor(self, name: str, processor: LogitsProcessor | None) -> None:
        """Register what edits the logits of requests that name it; None removes it."""
        assert self._executor is not None, "only ranks that have started get processors"
        self._executor.set_logits_processor(name, processor)

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Rank 0: return once all ranks have the adapter of this directory in memory. Raises RequestRejected or
        NotReady."""
        assert self._executor is not None, "only ranks that have started load adapters"
        return await asyncio.to_thread(self._executor.load_adapter, name, path)

    async def keep_adapters(self, record: AdapterRecord) -> None:
        """Rank 0: keep what a supervisor that takes the gang over must know of adapters."""
        self._adapters = record

    async def kept_adapters(self) -> AdapterRecord:
        return self._adapters

    async def keep_plan(self, plan: PoolPlan) -> None:
        """Rank 0: keep what a supervisor that takes the gang over must know of all pools. An older plan is ignored."""
        if plan.version > self._plan.version:
            self._plan = plan

    async def kept_plan(self) -> PoolPlan:
        return self._plan

    async def reopen(self) -> None:
        """Rank 0: take new requests again after `drain`."""
        if self._leader is not None:
            self._leader.reopen()

    async def drain(self, timeout_s: float) -> bool:
        """Rank 0: refuse new requests, and wait until the open ones have ended and their KV has been fetched. Return
        whether none is left."""
        if self._leader is None or self._executor is None:
            return True
        end_s = time.monotonic() + timeout_s
        is_idle = await asyncio.to_thread(self._leader.drain, timeout_s)
        return is_idle and await asyncio.to_thread(self._executor.wait_released, max(0.0, end_s - time.monotonic()))

    async def stop(self) -> None:
        """End the step loop and close the socket. Every rank of the gang must be told."""
        self._guard.stop()
        if self._executor is not None:
            await asyncio.to_thread(self._executor.shutdown)
        if self._leader is not None:
            await asyncio.to_thread(self._leader.stop)

    def _build_executor(self, args: TorchLlmArgs, comm: Comm, order: RankOrder) -> PyExecutor:
        from tensorweave.workers.build import build_executor

        return build_executor(
            args,
            comm,
            transfer_host=_transfer_host(order),
            transfer_secret=order.kv_secret,
            transfer_tls=order.tls,
            num_ranks_here=order.num_ranks_here,
            event_buffer_size=_EVENT_BUFFER_SIZE if order.place.rank == 0 else 0,
            loads_guides_early=True,
            log=self._log,
        )

    # ---- on threads

    def _start(self, order: RankOrder) -> RankStarted:
        with self._log.part("importing"):
            import tensorweave.workers.build  # noqa: F401  the engine and what it needs: nearly all of a rank's imports
        from tensorweave.cluster.llm_args import TorchLlmArgs
        from tensorweave.workers.engine_dir.model_digest import check_model_digest
        from tensorweave.workers.store.model_store import resolve_model

        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        args = _fit_args(TorchLlmArgs(**order.args), order)
        if order.model_digest is not None:
            path = resolve_model(args.model, revision=args.revision)
            check_model_digest(path, args.load_format, order.model_digest)
        comm = self._join(order, args)
        link = self._measure_gang_link(comm, args)
        self._phase = "loading the model"
        executor = self._build_executor(args, comm, order)
        # All objects of the start stay alive. To collect among them takes 0.15 s, which a step would wait for.
        gc.collect()
        gc.freeze()
        executor.start()
        self._executor = executor  # from here on heartbeats report on its loop, which must run by then
        leader = self._serve(executor, order, args) if order.place.rank == 0 else None
        return RankStarted(executor.kv_endpoint, executor.kv_fingerprint, leader, link, self._log.durations)

    def _serve(self, executor: PyExecutor, order: RankOrder, args: TorchLlmArgs) -> LeaderPlace:
        from tensorweave.workers.leader.server import LeaderServer

        max_kv_events = args.kv_cache_config.event_buffer_max_size
        tls = None if order.tls is None else order.tls.accepting()
        self._leader = LeaderServer(executor, order.listen_host, order.secret, max_kv_events=max_kv_events, tls=tls)
        return LeaderPlace(self._leader.start(), executor.info)

    def _measure_gang_link(self, comm: Comm, args: TorchLlmArgs) -> LinkRate | None:
        from tensorweave.workers.gang.comm import GroupComm
        from tensorweave.workers.gang.device import pick_device
        from tensorweave.workers.gang.link_rate import measure_link

        if not isinstance(comm, GroupComm) or comm.place.mesh.tensor == 1:
            return None
        link = measure_link(comm, pick_device(args.device))
        self._group, self._measured = comm, comm.traffic
        return link

    def _join(self, order: RankOrder, args: TorchLlmArgs) -> Comm:
        from tensorweave.workers.gang.comm import SoloComm
        from tensorweave.workers.gang.device import pick_device
        from tensorweave.workers.gang.joining import Joining

        if order.place.mesh.size == 1:
            return SoloComm()
        device = pick_device(args.device)
        uses_host_channel = device.type == "cpu" or args.allreduce_strategy == "ONESHOT"
        joining = Joining(
            order.place, order.interface_ip, device, order.start_timeout_s, self._note_phase, uses_host_channel
        )
        return joining.join(self._reach_rendezvous(order))

    def _set_up_log(self, process: str) -> None:
        if self._log_settings is not None:
            set_up_logging(self._log_settings, process)

    def _note_phase(self, phase: str) -> None:
        self._phase = phase

    def _reach_rendezvous(self, order: RankOrder) -> CallStore:
        """How this rank calls rank 0's rendezvous store."""
        if order.leader is None:
            return call_on_loop(self._rendezvous, self._loop, order.start_timeout_s)

        def call(verb: str, *arguments: Any) -> Any:
            pending = order.leader.rendezvous.remote(verb, *arguments).future()  # `ray.get` warns in an actor's threads
            try:
                return pending.result(order.start_timeout_s + _CALL_SLACK_S)
            except ActorUnavailableError as error:
                who = f"rank {order.place.rank} on {order.interface_ip}"
                raise WorkerLost(
                    f"{who} cannot ask rank 0 ({first_line(error)}): can their hosts connect to each other?"
                ) from error

        return call

    def _has_failed(self) -> bool:
        return self._executor is not None and self._executor.failure is not None


def _remove_placement_group() -> None:
    """Nobody else is left to remove the gang's. The other ranks, which run in it, end as well."""
    try:
        if (group := ray.util.get_current_placement_group()) is not None:
            ray.util.remove_placement_group(group)
    except RayError as error:
        logger.warning("the placement group stays: %s", error)


def _fit_args(args: TorchLlmArgs, order: RankOrder) -> TorchLlmArgs:
    """The gang's arguments as this rank must read them: its mesh, its device, its share of the node's cores."""
    mesh = order.place.mesh
    changes: dict[str, Any] = {"tensor_parallel_size": mesh.tensor, "pipeline_parallel_size": mesh.pipeline}
    if args.device == "auto":
        changes["device"] = "cuda" if order.has_gpu else "cpu"
    if args.num_threads is None:
        changes["num_threads"] = max(1, len(os.sched_getaffinity(0)) // order.num_ranks_here)
    return args.model_copy(update=changes)


def _transfer_host(order: RankOrder) -> str:
    """The address of this host at which other gangs read KV. Raises ValueError if it has none in the network given."""
    if order.transfer_network is None:
        return order.transfer_host
    return address_in(order.transfer_network, interface_addresses())
