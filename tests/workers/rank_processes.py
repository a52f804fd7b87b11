"""The ranks of a gang as processes that run what they are given: on CPUs, or each on a GPU of its own, the only one
that it sees, as Ray starts them."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import pytest
import torch

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.gang.comm import Comm, SoloComm, start_comm
from tensorweave.workers.gang.rank_store import RankStore
from tensorweave.workers.gang.rendezvous import CallStore, RendezvousStore, call_on_loop

START_S = 120.0


class RankProcesses:
    """`call` runs a function on all ranks at once: `work(comm, *arguments)`, of a module that they can import. As in a
    gang, the rendezvous store is on rank 0's event loop, which the others reach through its interpreter."""

    def __init__(self, size: int, *, on_gpus: bool, timeout_s: float = START_S) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        to_leader = [context.Pipe() for _ in range(size - 1)]
        stores = [[answering for answering, _ in to_leader], *([asking] for _, asking in to_leader)]
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, on_gpus, timeout_s, theirs, stores[rank])
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with pytest.MonkeyPatch.context() as patch:
                if on_gpus:
                    patch.setenv("CUDA_VISIBLE_DEVICES", str(rank))
                process.start()
            for passed_on in (theirs, *stores[rank]):
                passed_on.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def call(self, work: Callable[..., Any], *arguments: Any, timeout_s: float = START_S) -> list[Any]:
        """The results in rank order. Raises RuntimeError with a rank's traceback, or TimeoutError."""
        self.send(work, *arguments)
        deadline_s = time.monotonic() + timeout_s
        return [self.result(rank, deadline_s - time.monotonic()) for rank in range(len(self._pipes))]

    def send(self, work: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self._pipes:
            pipe.send((work, arguments))

    def result(self, rank: int, timeout_s: float) -> Any:
        if not self._pipes[rank].poll(max(0.0, timeout_s)):
            raise TimeoutError(f"rank {rank} has not answered")
        is_right, value = self._pipes[rank].recv()
        if not is_right:
            raise RuntimeError(f"rank {rank}: {value}")
        return value

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(
    rank: int, size: int, on_gpus: bool, timeout_s: float, pipe: Connection, stores: Sequence[Connection]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if on_gpus else torch.device("cpu")
    rank_store = RankStore(ask_through(stores[0]) if rank else _keep_store(stores, timeout_s), timeout_s)
    comm: Comm = SoloComm()
    if size > 1:
        comm = start_comm(MeshRank(rank, Mesh(tensor=size)), rank_store, device, timeout_s)
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, work(comm, *arguments)))
        except Exception:  # told to the test
            pipe.send((False, traceback.format_exc()))


def _keep_store(pipes: Sequence[Connection], timeout_s: float) -> CallStore:
    """Rank 0's way to its own store, which other ranks ask through these pipes."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    ask = call_on_loop(RendezvousStore(), loop, timeout_s)
    for pipe in pipes:
        threading.Thread(target=answer_asks, args=(pipe, ask), daemon=True).start()
    return ask


def answer_asks(pipe: Connection, ask: CallStore) -> None:
    """Until the rank ends that asks through the other end of the pipe."""
    with contextlib.suppress(EOFError, OSError), pipe:
        while True:
            verb, arguments = pipe.recv()
            try:
                pipe.send(ask(verb, *arguments))
            except TimeoutError as error:
                pipe.send(error)


def ask_through(pipe: Connection) -> CallStore:
    """A rank's way to the store of the process at the other end."""
    lock = threading.Lock()

    def ask(verb: str, *arguments: Any) -> Any:
        with lock:
            pipe.send((verb, arguments))
            answer = pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


def needs_gpus(count: int) -> Sequence[Any]:
    few = torch.cuda.device_count() < count
    return [pytest.mark.gpu, pytest.mark.skipif(few, reason=f"fewer than {count} GPUs")]
