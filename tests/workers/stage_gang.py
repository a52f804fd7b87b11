"""Gangs with pipeline stages in this process: ranks are threads, all else is what a service runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.workers.build import build_executor
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.gang.comm import Comm, SoloComm
from tests.workers.engine_drive import PEER_TIMEOUT_S, ThreadComm, engine_args
from tests.workers.executor_answers import Answers, collect_answers
from tests.workers.waiting import WAIT_S, wait_until


class ThreadStageLink:
    """A `StageLink` to threads: `inboxes` has one pair of queues a rank, for states and for results."""

    def __init__(self, place: MeshRank, inboxes: Sequence[tuple[queue.Queue[Tensor], queue.Queue[bytes]]]) -> None:
        self._place, self._inboxes = place, inboxes
        self.num_tokens: list[int] = []
        """Of each step whose states were sent from here."""
        self.num_computed = 0
        self._num_waiting = 0

    @property
    def is_waiting(self) -> bool:
        return self._num_waiting > 0

    def note_computed(self, seconds: float) -> None:
        self.num_computed += 1

    def gauges(self) -> Mapping[str, float]:
        return {f"stage_{self._place.pipeline}_computed": self.num_computed}

    def send_states(self, x_TD: Tensor) -> None:
        self.num_tokens.append(len(x_TD))
        self._inboxes[self._place.in_stage(self._place.pipeline + 1).rank][0].put(x_TD)

    def receive_states(self, x_TD: Tensor) -> Tensor:
        return x_TD.copy_(self._take(0))

    def send_result(self, message: bytes) -> None:
        for stage in range(self._place.mesh.pipeline - 1):
            self._inboxes[self._place.in_stage(stage).rank][1].put(message)

    def receive_result(self) -> bytes:
        message: bytes = self._take(1)
        return message

    def _take(self, kind: int) -> Any:
        self._num_waiting += 1
        try:
            return self._inboxes[self._place.rank][kind].get(timeout=PEER_TIMEOUT_S)
        except queue.Empty:
            raise WorkerLost(f"rank {self._place.rank}: nothing comes") from None
        finally:
            self._num_waiting -= 1


class StageComm(ThreadComm):
    """One of many threads; sums and gathers go through `stage`, a group of its own stage alone."""

    def __init__(self, place: MeshRank, everyone: ThreadComm, stage: Comm, stages: ThreadStageLink) -> None:
        super().__init__(everyone.rank, everyone._shared, everyone._barrier)
        self.place, self.stages, self._stage = place, stages, stage

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._stage.all_reduce(tensor)

    def gather_columns(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._stage.gather_columns(tensor, sizes)


def thread_comms(mesh: Mesh) -> list[Comm]:
    if mesh.size == 1:
        return [SoloComm()]
    shared, barrier = list[Any]([None] * mesh.size), threading.Barrier(mesh.size)
    groups = [(list[Any]([None] * mesh.tensor), threading.Barrier(mesh.tensor)) for _ in range(mesh.pipeline)]
    inboxes = [(queue.Queue[Tensor](), queue.Queue[bytes]()) for _ in range(mesh.size)]
    return [
        StageComm(
            place,
            ThreadComm(place.rank, shared, barrier),
            SoloComm() if mesh.tensor == 1 else ThreadComm(place.tensor, *groups[place.pipeline]),
            ThreadStageLink(place, inboxes),
        )
        for place in mesh.ranks()
    ]


class StageGang:
    """All ranks of a gang with the arguments of an `LLM`; they start with the first requests."""

    def __init__(
        self, path: Path, mesh: Mesh, *, change: Callable[[PyExecutor], None] | None = None, **knobs: Any
    ) -> None:
        sizes = {"tensor_parallel_size": mesh.tensor, "pipeline_parallel_size": mesh.pipeline}
        args = engine_args(path, guided_decoding_backend=knobs.pop("guided_decoding_backend", None), **sizes, **knobs)

        def build(comm: Comm) -> PyExecutor:
            torch.set_num_threads(1)
            return build_executor(args, comm)

        self.comms = thread_comms(mesh)
        with ThreadPoolExecutor(mesh.size) as pool:
            self.ranks = list(pool.map(build, self.comms))
        self._is_started = False

    @property
    def leader(self) -> PyExecutor:
        return self.ranks[0]

    def start(self) -> None:
        if not self._is_started:
            self._is_started = True
            for rank in self.ranks:
                rank.start()

    def answer(self, requests: Sequence[GenerateRequest]) -> Answers:
        self.leader.enqueue_requests(requests)
        self.start()
        return collect_answers(self.leader, [request.request_id for request in requests])

    def close(self) -> None:
        """All blocks are free on every rank, and the books are right."""
        caches: list[Any] = [rank._resources.kv_cache for rank in self.ranks]
        wait_until(lambda: all(cache.available == cache.num_blocks for cache in caches))
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            list(pool.map(lambda rank: rank.shutdown(WAIT_S), self.ranks))
        assert [cache.audit() for cache in caches] == [[] for _ in caches]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
