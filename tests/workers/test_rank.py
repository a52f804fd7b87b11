"""A rank's start: when its heartbeats begin to tell of a step loop, and what it says of hosts that it cannot reach."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnavailableError

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.llm_args import TorchLlmArgs, gang_mesh
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.cluster.ranks import RankOrder, RankReport, describe_phases
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.fakes.fake_executor import FakeExecutor
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.rank import RankWorker, _fit_args
from tests.workers.rank_orders import make_order


class AskedExecutor(FakeExecutor):
    """One whose rank is asked how it fares between the executor's making and its start."""

    kv_endpoint = None
    kv_fingerprint: dict[str, str] = {}
    waits_for_stage = False

    def __init__(self, worker: RankWorker) -> None:
        super().__init__()
        self._worker = worker
        self.report: RankReport | None = None

    @property
    def is_alive(self) -> bool:
        return self.report is not None and super().is_alive

    def start(self) -> None:
        self.report = asyncio.run(self._worker.heartbeat())

    def heartbeat(self) -> float:
        return 0.0

    def gauges(self) -> dict[str, float]:
        return {}


class AskedWorker(RankWorker):
    def __init__(self) -> None:
        super().__init__()
        self.executor = AskedExecutor(self)

    def _build_executor(self, args: TorchLlmArgs, comm: Comm, order: RankOrder) -> PyExecutor:
        return cast(PyExecutor, self.executor)


@pytest.fixture
def _a_process_of_its_own() -> Iterator[None]:
    """A rank freezes what its process has, and lets threads take turns sooner: not in those of other tests."""
    interval_s = sys.getswitchinterval()
    yield
    gc.unfreeze()
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("_a_process_of_its_own")
def test_a_heartbeat_before_the_loop_starts_is_no_fault() -> None:
    async def body() -> None:
        worker = AskedWorker()
        await worker.start(make_order())
        report = worker.executor.report
        assert report is not None
        assert report.fault is None
        assert report.phase == "loading the model"
        after = await worker.heartbeat()
        assert (after.is_alive, after.fault) == (True, None)
        await worker.stop()

    asyncio.run(body())


class UnreachableLeader:
    """Rank 0's handle where Ray cannot connect to its host: `rendezvous.remote(...)` gives a reference whose future
    has the error."""

    @property
    def rendezvous(self) -> UnreachableLeader:
        return self

    def remote(self, *arguments: Any) -> UnreachableLeader:
        return self

    def future(self) -> Future[Any]:
        failed: Future[Any] = Future()
        failed.set_exception(ActorUnavailableError("RPC error: failed to connect to ipv4:10.0.0.2:1234", None))
        return failed


@pytest.mark.usefixtures("_a_process_of_its_own")
def test_a_rank_0_that_ray_cannot_reach_is_told_with_who_asked() -> None:
    order = make_order(place=MeshRank(1, Mesh(tensor=2)), leader=UnreachableLeader())
    with pytest.raises(
        WorkerLost, match=r"rank 1 on 127\.0\.0\.1 cannot ask rank 0 \(.*10\.0\.0\.2:1234.*\): can their"
    ):
        asyncio.run(RankWorker().start(order))


def test_ranks_at_the_same_are_told_together() -> None:
    phases = [
        ("h1", "loading the model"),
        ("h2", "connecting to rank 0 at h1:1"),
        ("h1", "loading the model"),
        ("h3", ""),
    ]
    assert describe_phases(phases) == (
        "rank 0 (h1), 2 (h1): loading the model; rank 1 (h2): connecting to rank 0 at h1:1; rank 3 (h3): importing"
    )


def test_a_rank_reads_the_gangs_arguments_for_its_own_mesh() -> None:
    order = make_order(place=MeshRank(3, Mesh(tensor=2, pipeline=2)), num_ranks_here=1000)
    args = _fit_args(TorchLlmArgs(model="m"), order)
    assert gang_mesh(args) == order.place.mesh
    assert (args.device, args.num_threads) == ("cpu", 1)
