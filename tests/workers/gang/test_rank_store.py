"""A gang's store while torch exchanges more by it, with the interpreter locked: ranks are processes, as in a gang."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from typing import Any

import pytest
import torch.distributed as dist

from tensorweave.workers.gang.comm import Comm, GroupComm
from tensorweave.workers.gang.rank_store import RankStore
from tests.workers.rank_processes import RankProcesses
from tests.workers.waiting import WAIT_S

LOCKED = ctypes.PyDLL(None)
"""The C library, whose functions keep the interpreter locked while they wait, as torch's rendezvous does."""


def _all_gather(store: Any, rank: int, size: int, number: int, value: bytes) -> list[bytes]:
    """Torch's `StoreExchange`: sets a key, then waits for each other rank's and reads it."""
    keys = [f"CUDASymmetricMemory/{number}/{each}" for each in range(size)]
    store.set(keys[rank], value)
    found = []
    for each, key in enumerate(keys):
        if each != rank:
            store.wait([key])
        found.append(value if each == rank else store.get(key))
    return found


def _rendezvous(comm: Comm) -> list[int]:
    """Torch's steps: exchange process ids, then send a descriptor to each other and wait for one, with the interpreter
    locked; then a barrier."""
    assert isinstance(comm, GroupComm)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(f"\0tensorweave-test-{os.getpid()}")
    with sock, comm.store_exchanging():
        store = dist.PrefixStore("symmetric_memory-0_1", comm._store)
        pids = [int(pid) for pid in _all_gather(store, comm.rank, comm.size, 0, str(os.getpid()).encode())]
        for rank, pid in enumerate(pids):
            if rank != comm.rank:
                sock.sendto(str(comm.rank).encode(), f"\0tensorweave-test-{pid}")
        buffer, got = ctypes.create_string_buffer(8), []
        for _ in range(comm.size - 1):
            assert LOCKED.recv(sock.fileno(), buffer, 8, 0) == 1
            got.append(int(buffer.raw[:1]))
        _all_gather(store, comm.rank, comm.size, 1, b"done")
    return sorted(got)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_wait_with_the_interpreter_locked_need_no_other_interpreter(size: int) -> None:
    """Rank 0 has the store: while it waits for a descriptor it can answer nobody."""
    with RankProcesses(size, on_gpus=False) as ranks:
        expected = [[other for other in range(size) if other != rank] for rank in range(size)]
        assert ranks.call(_rendezvous, timeout_s=WAIT_S) == expected


def test_keys_of_other_threads_and_unknown_ones() -> None:
    """NCCL's monitor, a thread of torch, asks as before; a key that no rank has set is an error at once."""
    asked: list[str] = []
    store = RankStore(lambda verb, *arguments: asked.append(verb), timeout_s=1.0)
    with store.exchanging(lambda message: [message]):
        store.set("mine", b"1")
        store.wait(["mine"])
        assert store.get("mine") == b"1"
        other = threading.Thread(target=store.set, args=("theirs", b"2"))
        other.start()
        other.join(WAIT_S)
        with pytest.raises(RuntimeError, match="'theirs' before its rank has set it"):
            store.get("theirs")
    assert asked == ["set"]
    store.get("mine")
    assert asked == ["set", "get"], "behind the block rank 0 is asked again"
