"""Agreement and collectives over real gloo groups: ranks are processes, as in a gang."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tensorweave.cluster.errors import WorkerLost
from tensorweave.workers.comm import SoloComm, start_comm


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(rank: int, size: int, port: int, timeout_s: float) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size=None, is_master=rank == 0, wait_for_workers=False)
    return start_comm(rank, size, store, torch.device("cpu"), timeout_s)


def _exercise(rank: int, size: int, port: int, results: Any) -> None:
    comm = _join(rank, size, port, 20.0)
    news = [b"", b"x", bytes(range(256)) * 15, bytes(4088), bytes(range(256)) * 400]
    heard = [comm.agree(item if rank == 0 else None) == item for item in news]
    total = comm.all_reduce(torch.full((3,), float(rank + 1)))
    sizes = [3, 2, 1][:size]
    columns = comm.gather_columns(torch.full((2, sizes[rank]), float(rank)), sizes)
    results.put((rank, all(heard), comm.agree_min(10 - rank), total.tolist(), columns.tolist()))
    comm.close()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_sum_and_gather(size: int) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    ranks = [context.Process(target=_exercise, args=(rank, size, port, results)) for rank in range(size)]
    for process in ranks:
        process.start()
    got = sorted(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=30)
    row = [float(rank) for rank, width in enumerate([3, 2, 1][:size]) for _ in range(width)]
    assert got == [(rank, True, 11 - size, [float(sum(range(1, size + 1)))] * 3, [row, row]) for rank in range(size)]


def _wait_for_news(rank: int, port: int, results: Any) -> None:
    comm = _join(rank, 2, port, 3.0)
    comm.agree(b"go" if rank == 0 else None)
    if rank == 0:  # a stopped process may hold the queue's lock, so only the survivor writes
        comm.agree(str(os.getpid()).encode())
    else:
        results.put(int(comm.agree(None)))
    began_s = time.monotonic()
    try:
        while time.monotonic() - began_s < 30:
            comm.agree(b"beat" if rank == 0 else None)
            time.sleep(0.05)
        results.put(("no error", rank))
    except WorkerLost as error:
        results.put(("lost", str(error)))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_silent_peer_is_a_lost_worker(fault: signal.Signals) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    ranks = [context.Process(target=_wait_for_news, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    pid = results.get(timeout=60)
    os.kill(pid, fault)
    word, detail = results.get(timeout=10)
    os.kill(pid, signal.SIGKILL)
    for process in ranks:
        process.join(timeout=10)
    assert word == "lost"
    assert "rank 1 of 2" in detail


def test_alone_everything_is_as_given() -> None:
    comm = SoloComm()
    tensor = torch.ones(2, 3)
    assert comm.agree(b"n") == b"n"
    assert comm.agree_min(4) == 4
    assert comm.all_reduce(tensor) is tensor
    assert comm.gather_columns(tensor, [3]) is tensor
