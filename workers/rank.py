"""The actor of one rank: it builds the executor, serves it on a socket (rank 0) and answers heartbeats.

`RankWorker` is a plain class; the gang makes it a Ray actor. Its methods run on the actor's event loop, everything slow
on threads, so that heartbeats are answered while a model loads or a step computes. The engine's modules are imported on
start: the supervisor, which needs this class only to launch it, then carries no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import psutil
import ray
from ray.exceptions import ActorUnavailableError, RayError

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.host_memory import oom_kills
from tensorweave.cluster.protocol import KvSource, LinkMeasurement
from tensorweave.cluster.rank_watch import first_line
from tensorweave.cluster.ranks import LeaderPlace, LinkRate, RankOrder, RankPlace, RankReport, RankStarted, Traffic
from tensorweave.cluster.versions import Versions

if TYPE_CHECKING:
    from tensorweave.cluster.gang_record import GangRecord
    from tensorweave.cluster.llm_args import TorchLlmArgs
    from tensorweave.workers.executor.executor import PyExecutor
    from tensorweave.workers.gang.comm import Comm, GroupComm
    from tensorweave.workers.gang.rendezvous import Ask, Board
    from tensorweave.workers.leader.server import LeaderServer
    from tensorweave.workers.sampling.logits_processors import LogitsProcessor

logger = logging.getLogger(__name__)

_GUARD_INTERVAL_S: Final = 1.0
_ASK_SLACK_S: Final = 10.0
_REACHED_KEY: Final = "where rank 0 listens"
_REACH_TIMEOUT_S: Final = 20.0
"""Rank 0 listens before any other rank is told where."""
_LAST_WORDS_S: Final = 3.0
"""A rank whose executor failed stays this long: its heartbeat says why, its leader tells its clients."""
_EVENT_BUFFER_SIZE: Final = 1 << 16
"""KV events between two looks of the leader, a quarter of a second apart at most: thousands of full steps."""
_PR_SET_PDEATHSIG: Final = 1
_SWITCH_INTERVAL_S: Final = 0.001
"""How long one thread may keep another waiting for the interpreter: Python's own 5 ms would show in token times."""


class RankWorker:
    """One rank of a gang, from `prepare` to `stop`; used once."""

    def __init__(self) -> None:
        self._executor: PyExecutor | None = None
        self._leader: LeaderServer | None = None
        self._its_board: Board | None = None
        self._making = threading.Lock()
        self._group: GroupComm | None = None
        self._measured = Traffic()
        self._phase = ""
        self._record: GangRecord | None = None
        self._lease_s: float | None = None
        self._num_silent = 0
        self._stopping = threading.Event()
        self._parent = os.getppid()

    async def prepare(self, lease_s: float | None = None) -> RankPlace:
        """Where this rank is; from here on it dies with its node's Ray, and, given a lease, so long after the last
        heartbeat."""
        _die_with_parent()
        self._lease_s = lease_s
        raise_file_limit()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._guard, name="rank-guard", daemon=True).start()
        return RankPlace(
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            created_s=psutil.Process().create_time(),
            oom_kills=oom_kills(),
        )

    async def versions(self) -> list[Any]:
        """`Versions` of this process, in plain types: the caller may be of another one."""
        return Versions.here().to_wire()

    async def rendezvous(self, verb: str, *arguments: Any) -> Any:
        """Rank 0 only: what the ranks tell each other while their group forms; see `Board.answer`."""
        return await self._board().answer(verb, *arguments)

    async def start(self, order: RankOrder) -> RankStarted:
        """Load and run; returns when requests can come. Raises ValueError for wrong arguments or model files."""
        return await asyncio.to_thread(self._start, order)

    async def keep_record(self, record: GangRecord) -> None:
        """Rank 0 only: what whoever takes the gang over must know."""
        self._record = record

    async def record(self) -> GangRecord | None:
        """None before the gang is ready."""
        return self._record

    async def heartbeat(self) -> RankReport:
        self._num_silent = 0
        executor = self._executor
        num_open, max_open = count_open_files()
        if executor is None:
            return RankReport(phase=self._phase, num_open_files=num_open, max_open_files=max_open)
        return RankReport(
            progress_age_s=executor.heartbeat(),
            is_alive=executor.is_alive,
            failure=None if executor.failure is None else executor.failure.message,
            num_requests=executor.num_requests,
            gauges=executor.gauges(),
            num_open_files=num_open,
            max_open_files=max_open,
            traffic=None if self._group is None else self._group.traffic.since(self._measured),
        )

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        """Rank 0 of a gang that takes KV: what comes from the gang that gives it."""
        assert self._executor is not None, "a link leads to a rank that has started"
        return await asyncio.to_thread(self._executor.measure_link, source)

    async def set_logits_processor(self, name: str, processor: LogitsProcessor | None) -> None:
        """What requests that name it have their logits edited by; None takes it away."""
        assert self._executor is not None, "a rank that has started is equipped"
        self._executor.set_logits_processor(name, processor)

    async def drain(self, timeout_s: float) -> bool:
        """Rank 0: refuse new requests, let the open ones end and their KV be fetched. True when none is left."""
        if self._leader is None or self._executor is None:
            return True
        end_s = time.monotonic() + timeout_s
        is_idle = await asyncio.to_thread(self._leader.drain, timeout_s)
        return is_idle and await asyncio.to_thread(self._executor.wait_released, max(0.0, end_s - time.monotonic()))

    async def stop(self) -> None:
        """End the loop (on all ranks: every one must be told) and the socket."""
        self._stopping.set()
        if self._executor is not None:
            await asyncio.to_thread(self._executor.shutdown)
        if self._leader is not None:
            await asyncio.to_thread(self._leader.stop)

    def _build_executor(self, args: TorchLlmArgs, comm: Comm, order: RankOrder) -> PyExecutor:
        from tensorweave.workers.build import build_executor

        return build_executor(
            args,
            comm,
            transfer_host=order.transfer_host,
            transfer_secret=order.kv_secret,
            num_ranks_here=order.num_ranks_here,
            event_buffer_size=_EVENT_BUFFER_SIZE if order.place.rank == 0 else 0,
        )

    # ---- on threads

    def _start(self, order: RankOrder) -> RankStarted:
        from tensorweave.cluster.llm_args import TorchLlmArgs
        from tensorweave.workers.engine_dir.model_digest import check_model_digest
        from tensorweave.workers.leader.server import LeaderServer
        from tensorweave.workers.store.model_store import resolve_model

        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        args = _fit_args(TorchLlmArgs(**order.args), order)
        if order.model_digest is not None:
            path = resolve_model(args.model, revision=args.revision)
            check_model_digest(path, args.load_format, order.model_digest)
        comm = self._join(order, args)
        link = self._measure_link(comm, args)
        self._phase = "loading the model"
        executor = self._build_executor(args, comm, order)
        executor.start()
        self._executor = executor  # from here on heartbeats tell of its loop, which must run by then
        leader = None
        if order.place.rank == 0:
            self._leader = LeaderServer(
                executor,
                order.listen_host,
                order.secret,
                max_kv_events=args.kv_cache_config.event_buffer_max_size,
            )
            leader = LeaderPlace(self._leader.start(), executor.info)
        return RankStarted(executor.kv_endpoint, executor.kv_fingerprint, leader, link)

    def _measure_link(self, comm: Comm, args: TorchLlmArgs) -> LinkRate | None:
        from tensorweave.workers.gang.comm import GroupComm
        from tensorweave.workers.gang.device import pick_device
        from tensorweave.workers.gang.link_rate import measure_link

        if not isinstance(comm, GroupComm):
            return None
        link = measure_link(comm, pick_device(args.device))
        self._group, self._measured = comm, comm.traffic
        return link

    def _join(self, order: RankOrder, args: TorchLlmArgs) -> Comm:
        from tensorweave.workers.gang.comm import start_comm
        from tensorweave.workers.gang.device import pick_device
        from tensorweave.workers.gang.reach import await_reachable, listening
        from tensorweave.workers.gang.rendezvous import RankStore

        device = pick_device(args.device)
        if order.place.mesh.size == 1:
            return start_comm(order.place, None, device, order.start_timeout_s)
        interface = interface_of(order.interface_ip)
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        if interface != "lo":
            os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
        store = RankStore(self._way_to_board(order), order.start_timeout_s)
        with contextlib.ExitStack() as joining:
            if order.place.rank == 0:
                host, port = joining.enter_context(listening(order.interface_ip, order.place.mesh.size))
                store.set(_REACHED_KEY, f"{port} {host}".encode())
            else:
                self._phase = "asking rank 0 where it listens"
                port_text, host = store.get(_REACHED_KEY).decode().split(" ", 1)
                self._phase = f"connecting to rank 0 at {host}:{port_text}"
                who = f"rank {order.place.rank} on {order.interface_ip}"
                await_reachable(host, int(port_text), _REACH_TIMEOUT_S, who=who, whom="rank 0")
            self._phase = f"waiting for all {order.place.mesh.size} ranks to join"
            return start_comm(order.place, store, device, order.start_timeout_s)

    def _way_to_board(self, order: RankOrder) -> Ask:
        from tensorweave.workers.gang.rendezvous import ask_on_loop

        if order.place.rank == 0:
            return ask_on_loop(self._board(), self._loop, order.start_timeout_s)
        leader = order.leader
        assert leader is not None, "every rank but 0 has a leader"

        def ask(verb: str, *arguments: Any) -> Any:
            asked = leader.rendezvous.remote(verb, *arguments).future()  # `ray.get` warns in any thread of this actor
            try:
                return asked.result(order.start_timeout_s + _ASK_SLACK_S)
            except ActorUnavailableError as error:
                who = f"rank {order.place.rank} on {order.interface_ip}"
                raise WorkerLost(
                    f"{who} cannot ask rank 0 ({first_line(error)}): can their hosts connect to each other?"
                ) from error

        return ask

    def _board(self) -> Board:
        from tensorweave.workers.gang.rendezvous import Board

        with self._making:
            if self._its_board is None:
                self._its_board = Board()
        return self._its_board

    def _guard(self) -> None:
        """Ends this process when its parent has gone, nobody supervises it any more or its executor has failed,
        whatever its other threads do. Silence is counted in turns, not in seconds: a host may have stood still."""
        while not self._stopping.wait(_GUARD_INTERVAL_S):
            if os.getppid() != self._parent:
                os._exit(1)
            self._num_silent += 1
            if self._lease_s is not None and self._num_silent * _GUARD_INTERVAL_S > self._lease_s:
                logger.error("no supervisor has asked for %g s: this rank ends", self._lease_s)
                _give_back_room()
                os._exit(1)
            if self._executor is not None and self._executor.failure is not None:
                self._stopping.wait(_LAST_WORDS_S)
                os._exit(1)


def _give_back_room() -> None:
    """Nobody else is left to remove the gang's placement group. The other ranks, which are in it, end as well."""
    try:
        if (group := ray.util.get_current_placement_group()) is not None:
            ray.util.remove_placement_group(group)
    except RayError as error:
        logger.warning("the placement group stays: %s", error)


def interface_of(ip: str) -> str:
    """The network interface that carries `ip`: gloo must not guess by the host's name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == ip for address in addresses):
            return str(name)
    raise ValueError(f"no network interface of this node carries {ip}")


def raise_file_limit() -> None:
    """As many descriptors as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # "infinity" may be more than the kernel takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def count_open_files() -> tuple[int, int]:
    """Descriptors of this process, and its limit; 0 where there is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return psutil.Process().num_fds(), 0 if limit == resource.RLIM_INFINITY else limit


def _fit_args(args: TorchLlmArgs, order: RankOrder) -> TorchLlmArgs:
    """The gang's arguments as this rank must read them: its size, its device, its share of the node's cores."""
    changes: dict[str, Any] = {"tensor_parallel_size": order.place.mesh.tensor}
    if args.device == "auto":
        changes["device"] = "cuda" if order.has_gpu else "cpu"
    if args.num_threads is None:
        changes["num_threads"] = max(1, len(os.sched_getaffinity(0)) // order.num_ranks_here)
    return args.model_copy(update=changes)


def _die_with_parent() -> None:
    """On Linux the kernel kills us with the raylet, even while we are stopped; `_guard` is the way elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
