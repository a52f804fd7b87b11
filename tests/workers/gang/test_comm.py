"""Agreement and collectives over real gloo groups: ranks are processes, as in a gang."""

from __future__ import annotations

import asyncio
import datetime
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import distributed_c10d

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.gang.comm import Comm, GroupComm, SoloComm, start_comm
from tensorweave.workers.gang.rank_store import RankStore
from tensorweave.workers.gang.rendezvous import CallStore, RendezvousStore, call_on_loop
from tensorweave.workers.gang.stages import StageLink
from tests.workers.rank_processes import answer_asks, ask_through
from tests.workers.waiting import WAIT_S

SILENCE_S = 3.0


@pytest.fixture
def gang() -> Iterator[Gang]:
    """The parent process has the ranks' rendezvous store."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    gang = Gang(call_on_loop(RendezvousStore(), loop, timeout_s=2 * WAIT_S))
    yield gang
    gang.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()


class Gang:
    """Ranks as processes, each with a pipe to the store."""

    def __init__(self, ask: CallStore) -> None:
        self.ask = ask
        self._context = mp.get_context("spawn")
        self.results = self._context.Queue()
        self.ranks: list[Any] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(len(self.ranks), theirs, *arguments, self.results))
        process.start()
        theirs.close()
        self.ranks.append(process)
        threading.Thread(target=answer_asks, args=(ours, self.ask), daemon=True).start()

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join(WAIT_S)


def _join(rank: int, size: int, pipe: Connection) -> Comm:
    return _join_mesh(rank, Mesh(tensor=size), pipe)


def _join_mesh(rank: int, mesh: Mesh, pipe: Connection) -> Comm:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = RankStore(ask_through(pipe), timeout_s=2 * WAIT_S)
    return start_comm(MeshRank(rank, mesh), store, torch.device("cpu"), timeout_s=2 * WAIT_S)


def _num_listening() -> int:
    """Ports of this process that a stranger could connect to."""
    return sum(port.status == psutil.CONN_LISTEN for port in psutil.Process().net_connections("tcp"))


def _exercise(rank: int, pipe: Connection, size: int, results: Any) -> None:
    comm = _join(rank, size, pipe)
    num_listening = _num_listening()
    inputs = [b"", b"x", bytes(range(256)) * 15, bytes(4088), bytes(range(256)) * 400]
    heard = [comm.agree(item if rank == 0 else None) == item for item in inputs]
    assert isinstance(comm, GroupComm)
    comm._channel, channel = None, comm._channel
    heard += [comm.agree(item if rank == 0 else None) == item for item in inputs]  # as between hosts
    comm._channel = channel
    total = comm.all_reduce(torch.full((3,), float(rank + 1)))
    sizes = [3, 2, 1][:size]
    columns = comm.gather_columns(torch.full((2, sizes[rank]), float(rank)), sizes)
    results.put((rank, all(heard), comm.agree_min(10 - rank), total.tolist(), columns.tolist(), num_listening))
    comm.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_sum_and_gather_and_no_port_stays_open(size: int, gang: Gang) -> None:
    for _ in range(size):
        gang.start(_exercise, size)
    got = sorted(gang.results.get(timeout=2 * WAIT_S) for _ in gang.ranks)
    for process in gang.ranks:
        process.join(timeout=WAIT_S)
    row = [float(rank) for rank, width in enumerate([3, 2, 1][:size]) for _ in range(width)]
    sums = [float(sum(range(1, size + 1)))] * 3
    num_listening = 0 if sys.platform == "linux" else got[0][-1]
    assert got == [(rank, True, 11 - size, sums, [row, row], num_listening) for rank in range(size)]
    assert [process.exitcode for process in gang.ranks] == [0] * size, "gloo ends well without its ports"


STAGES = Mesh(tensor=2, pipeline=2)
RESULTS = [b"", b"tokens", bytes(range(256)) * 15, bytes(4088), bytes(range(256)) * 400]


def _tells_its_time(link: StageLink, stage: int) -> bool:
    """The time in which states were waited for is no work."""
    link.note_computed(500.0)
    gauges = link.gauges()
    assert link.gauges() == gauges
    busy_s, num_bytes = gauges[f"stage_{stage}_busy_seconds_total"], gauges[f"stage_{stage}_sent_bytes_total"]
    if stage == 0:
        return busy_s == 500.0 and num_bytes == sum(range(5)) * 3 * 4
    return 0 < busy_s < 500.0 and num_bytes > sum(map(len, RESULTS))


def _pass_on(rank: int, pipe: Connection, results: Any) -> None:
    """Stage 0 sends more than anybody has received yet. In the end a rank of stage 1 dies."""
    comm = _join_mesh(rank, STAGES, pipe)
    place, link = comm.place, comm.stages
    total = comm.all_reduce(torch.full((2,), float(rank + 1))).tolist()
    columns = comm.gather_columns(torch.full((1, 2), float(rank)), [2, 2]).tolist()
    heard = [comm.agree(b"all" if rank == 0 else None), comm.agree_min(10 - rank)]
    states = [torch.full((length, 3), float(10 * place.tensor + length)) for length in range(5)]
    if place.is_first_stage:
        for x_TD in states:
            link.send_states(x_TD)
        told = [link.receive_result() for _ in RESULTS] == RESULTS
    else:
        for message in RESULTS:
            link.send_result(message)
        told = all(link.receive_states(torch.empty_like(x_TD)).equal(x_TD) for x_TD in states)
    told &= _tells_its_time(link, place.pipeline)
    results.put((rank, total, columns, heard, told, _num_listening()))
    results.close()
    results.join_thread()
    comm.agree_min(rank)  # nobody dies before all have received everything; an agreement waits for rank 0 alone
    if rank == 1:
        try:
            link.receive_result()
        except WorkerLost as error:
            ask_through(pipe)("set", "lost", str(error).encode())
    os._exit(0)


@pytest.mark.slow
def test_stages_pass_on_states_and_results(gang: Gang) -> None:
    for _ in range(STAGES.size):
        gang.start(_pass_on)
    got = sorted(gang.results.get(timeout=2 * WAIT_S) for _ in gang.ranks)
    num_listening = 0 if sys.platform == "linux" else got[0][-1]
    sums = [[3.0, 3.0]] * 2 + [[7.0, 7.0]] * 2
    rows = [[[0.0, 0.0, 1.0, 1.0]]] * 2 + [[[2.0, 2.0, 3.0, 3.0]]] * 2
    assert got == [(rank, sums[rank], rows[rank], [b"all", 7], True, num_listening) for rank in range(4)]
    for process in gang.ranks:
        process.join(timeout=WAIT_S)
    assert "rank 1: pipeline stage 1 is gone or silent" in gang.ask("get", "lost", WAIT_S).decode()


def _beat(rank: int, pipe: Connection, is_one_host: bool, results: Any) -> None:
    """Rank 1 survives and tells: a stopped process may hold the queue's lock."""
    comm = _join(rank, 2, pipe)
    comm.agree(b"go" if rank == 0 else None)
    if rank == 0:
        comm.agree(str(os.getpid()).encode())
    else:
        results.put(int(comm.agree(None)))
        assert isinstance(comm, GroupComm)
        if is_one_host and comm._channel is not None:
            comm._channel.set_timeout(SILENCE_S)
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=SILENCE_S), comm._control)
    assert isinstance(comm, GroupComm)
    if not is_one_host:
        comm._channel = None
    deadline_s = time.monotonic() + 2 * WAIT_S
    outcome = ("no error", "")
    while outcome[0] == "no error" and time.monotonic() < deadline_s:
        try:
            comm.agree(b"beat" if rank == 0 else None)
        except WorkerLost as error:
            outcome = ("lost", str(error))
        time.sleep(0.05)
    if rank == 1:
        results.put(outcome)
        results.close()
        results.join_thread()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("is_one_host", [True, False])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_peer_is_a_lost_worker(fault: signal.Signals, is_one_host: bool, gang: Gang) -> None:
    for _ in range(2):
        gang.start(_beat, is_one_host)
    pid = gang.results.get(timeout=2 * WAIT_S)
    os.kill(pid, fault)
    word, detail = gang.results.get(timeout=WAIT_S)
    os.kill(pid, signal.SIGKILL)
    for process in gang.ranks:
        process.join(timeout=WAIT_S)
    assert word == "lost"
    assert "rank 1 of 2" in detail


def test_a_rank_that_never_comes_is_named_in_time(gang: Gang) -> None:
    gang.start(_wait_for_a_peer)
    assert "no rank has told" in gang.results.get(timeout=2 * WAIT_S)


def _wait_for_a_peer(rank: int, pipe: Connection, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = RankStore(ask_through(pipe), timeout_s=0.2)
    try:
        start_comm(MeshRank(rank, Mesh(tensor=2)), store, torch.device("cpu"), timeout_s=0.2)
    except Exception as error:  # whatever torch makes of it
        results.put(str(error))
        results.close()
        results.join_thread()
    os._exit(0)


def test_a_sealed_store_asks_nobody() -> None:
    asked: list[str] = []
    store = RankStore(lambda verb, *arguments: asked.append(verb) or True, timeout_s=1.0)
    assert store.check(["dump"])
    store.seal()
    assert not store.check(["dump"])
    store.set("dump", b"1")
    assert asked == ["has"]


def test_alone_everything_is_as_given() -> None:
    comm = SoloComm()
    tensor = torch.ones(2, 3)
    assert comm.agree(b"n") == b"n"
    assert comm.agree_min(4) == 4
    assert comm.all_reduce(tensor) is tensor
    assert comm.gather_columns(tensor, [3]) is tensor
