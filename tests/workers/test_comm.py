"""Agreement and collectives over real gloo groups: ranks are processes, as in a gang."""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tensorweave.cluster.errors import WorkerLost
from tensorweave.workers.comm import Comm, GroupComm, SoloComm, start_comm
from tests.workers.waiting import WAIT_S

HOST, SILENCE_S = "127.0.0.1", 3.0


@pytest.fixture
def store() -> dist.TCPStore:
    """The rendezvous, at a port of the system's choice."""
    return dist.TCPStore(HOST, 0, world_size=None, is_master=True, wait_for_workers=False)


def _join(rank: int, size: int, port: int) -> Comm:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, port, world_size=None, is_master=False, wait_for_workers=False)
    return start_comm(rank, size, store, torch.device("cpu"), timeout_s=2 * WAIT_S)


def _exercise(rank: int, size: int, port: int, results: Any) -> None:
    comm = _join(rank, size, port)
    news = [b"", b"x", bytes(range(256)) * 15, bytes(4088), bytes(range(256)) * 400]
    heard = [comm.agree(item if rank == 0 else None) == item for item in news]
    total = comm.all_reduce(torch.full((3,), float(rank + 1)))
    sizes = [3, 2, 1][:size]
    columns = comm.gather_columns(torch.full((2, sizes[rank]), float(rank)), sizes)
    results.put((rank, all(heard), comm.agree_min(10 - rank), total.tolist(), columns.tolist()))
    comm.close()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_sum_and_gather(size: int, store: dist.TCPStore) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_exercise, args=(rank, size, store.port, results)) for rank in range(size)]
    for process in ranks:
        process.start()
    got = sorted(results.get(timeout=2 * WAIT_S) for _ in ranks)
    for process in ranks:
        process.join(timeout=WAIT_S)
    row = [float(rank) for rank, width in enumerate([3, 2, 1][:size]) for _ in range(width)]
    assert got == [(rank, True, 11 - size, [float(sum(range(1, size + 1)))] * 3, [row, row]) for rank in range(size)]


def _beat(rank: int, port: int, results: Any) -> None:
    """Rank 1 survives and tells: a stopped process may hold the queue's lock."""
    comm = _join(rank, 2, port)
    comm.agree(b"go" if rank == 0 else None)
    if rank == 0:
        comm.agree(str(os.getpid()).encode())
    else:
        results.put(int(comm.agree(None)))
        assert isinstance(comm, GroupComm)
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=SILENCE_S), comm._control)
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


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_peer_is_a_lost_worker(fault: signal.Signals, store: dist.TCPStore) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_beat, args=(rank, store.port, results), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    pid = results.get(timeout=2 * WAIT_S)
    os.kill(pid, fault)
    word, detail = results.get(timeout=WAIT_S)
    os.kill(pid, signal.SIGKILL)
    for process in ranks:
        process.join(timeout=WAIT_S)
    assert word == "lost"
    assert "rank 1 of 2" in detail


def test_alone_everything_is_as_given() -> None:
    comm = SoloComm()
    tensor = torch.ones(2, 3)
    assert comm.agree(b"n") == b"n"
    assert comm.agree_min(4) == 4
    assert comm.all_reduce(tensor) is tensor
    assert comm.gather_columns(tensor, [3]) is tensor
