"""A pool's gang of two ranks under a private Ray: right tokens, clear errors, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import psutil
import pytest
import ray
from ray.actor import ActorHandle

from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.gang import GangSpec
from tensorweave.cluster.pool import PoolSpec
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.cluster.ray_session import import_root, start_or_join_ray
from tensorweave.cluster.supervisor import PoolSupervisor, start_supervisor, stop_supervisor
from tensorweave.workers.fake_engine import hash_token
from tensorweave.workers.fake_gang import HashRankWorker

VOCAB_SIZE = 1000
PROMPT = [11, 22, 33]
FAULT_TO_ERROR_S = 10.0


@pytest.fixture(scope="module", autouse=True)
def _ray_session() -> Iterator[None]:
    with start_or_join_ray(num_cpus=4):
        yield


@contextlib.contextmanager
def _pool(replicas: int = 1, **gang: Any) -> Iterator[ActorHandle[PoolSupervisor]]:
    gang = {"tensor_parallel_size": 2, "args": {"model": "hash"}, "start_timeout_s": 60.0, **gang}
    supervisor = start_supervisor([PoolSpec("main", GangSpec(**gang), replicas, max_faults=20)], HashRankWorker)
    try:
        yield supervisor
    finally:
        stop_supervisor(supervisor)


@contextlib.asynccontextmanager
async def _fleet(supervisor: ActorHandle[PoolSupervisor]) -> AsyncIterator[WatchedFleet]:
    fleet = WatchedFleet(supervisor)
    try:
        await fleet.wait_ready(60.0)
        yield fleet
    finally:
        await fleet.close()


def _run(body: Callable[[], Awaitable[None]], timeout_s: float = 150.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await body()

    asyncio.run(bounded())


def _oracle(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


async def _generate(fleet: WatchedFleet, request_id: str, num_tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    request = GenerateRequest(request_id, list(prompt), SamplingSpec(max_tokens=num_tokens))
    return [token async for chunk in fleet.links()[0].generate(request) for token in chunk.token_ids]


async def _wait_successor(fleet: WatchedFleet, old_id: str) -> None:
    while old_id in [link.gang_id for link in fleet.links()]:
        await asyncio.sleep(0.05)
    await fleet.wait_ready(60.0)


async def _rank_pids(fleet: WatchedFleet) -> list[int]:
    [pool] = await fleet.describe()
    return [rank["pid"] for gang in pool["gangs"] for rank in gang["ranks"]]


def _wait_gone(pids: Sequence[int], timeout_s: float = 15.0) -> None:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def _wait_all_free(timeout_s: float = 15.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while _free_cpus() < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < give_up_s, f"only {_free_cpus()} CPUs came back"
        time.sleep(0.1)


def test_tokens_drain_and_stop() -> None:
    pids: list[int] = []

    async def body() -> None:
        async with _fleet(supervisor) as fleet:
            pids.extend(await _rank_pids(fleet))
            assert len(pids) == 2
            prompts = [[n, 2 * n, 7] for n in range(1, 9)]
            jobs = [_generate(fleet, f"r{n}", 3 * n + 1, prompt) for n, prompt in enumerate(prompts)]
            answers = await asyncio.gather(*jobs)
            assert answers == [_oracle(prompt, 3 * n + 1) for n, prompt in enumerate(prompts)]
            running = asyncio.create_task(_generate(fleet, "last", 50))
            await asyncio.sleep(0.05)
            await supervisor.drain.remote(20.0)
            assert await running == _oracle(PROMPT, 50)
            assert fleet.links() == []

    with _pool(worker_options={"step_s": 0.005}) as supervisor:
        _run(body)
    _wait_gone(pids)
    _wait_all_free()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_or_hangs_ends_its_gang_and_a_new_one_answers(rank: int, how: signal.Signals) -> None:
    seen: list[int] = []

    async def body() -> None:
        async with _fleet(supervisor) as fleet:
            pids = await _rank_pids(fleet)
            seen.extend(pids)
            old_id = fleet.links()[0].gang_id
            jobs = [asyncio.create_task(_generate(fleet, f"r{n}", 500, [n, 5])) for n in range(4)]
            await asyncio.sleep(0.3)
            assert not any(job.done() for job in jobs)
            os.kill(pids[rank], how)
            fault_s = time.monotonic()
            results = await asyncio.gather(*jobs, return_exceptions=True)
            assert [type(result) for result in results] == [WorkerLost] * 4
            assert time.monotonic() - fault_s < FAULT_TO_ERROR_S
            await _wait_successor(fleet, old_id)
            assert await _generate(fleet, "next", 20) == _oracle(PROMPT, 20)
            now = await _rank_pids(fleet)
            assert not set(now) & set(pids)
            seen.extend(now)

    with _pool(worker_options={"step_s": 0.01}) as supervisor:
        _run(body)
    _wait_gone(seen)
    _wait_all_free()


def test_a_supervisor_that_is_killed_comes_back_with_new_gangs() -> None:
    seen: list[int] = []

    async def body() -> None:
        async with _fleet(supervisor) as fleet:
            old = await _rank_pids(fleet)
            seen.extend(old)
            old_id = fleet.links()[0].gang_id
            [process] = _children_named(psutil.Process(old[0]).parent(), "PoolSupervisor")
            process.kill()
            await asyncio.to_thread(_wait_gone, old)
            await _wait_successor(fleet, old_id)
            assert await _generate(fleet, "next", 20) == _oracle(PROMPT, 20)
            seen.extend(await _rank_pids(fleet))

    with _pool() as supervisor:
        _run(body)
    _wait_gone(seen)
    _wait_all_free()


def _children_named(parent: psutil.Process | None, name: str) -> list[psutil.Process]:
    """Ray names an actor's process after its class."""
    assert parent is not None
    return [child for child in parent.children() if name in " ".join(child.cmdline())]


def test_wrong_arguments_fail_the_pool_at_once_with_the_reason() -> None:
    async def body() -> None:
        fleet = WatchedFleet(supervisor)
        before_s = time.monotonic()
        with pytest.raises(NotReady, match="model 'refused' is refused"):
            await fleet.wait_ready(60.0)
        assert time.monotonic() - before_s < 50.0
        await fleet.close()

    with _pool(args={"model": "refused"}) as supervisor:
        _run(body)
    _wait_all_free()


def test_a_gang_that_cannot_be_placed_says_what_is_missing() -> None:
    async def body() -> None:
        fleet = WatchedFleet(supervisor)
        with pytest.raises(NotReady, match=r"2 rank.* with 1 CPU, 1 GPU each .* 0 of 0 GPU free.* missing: 2 GPU"):
            await fleet.wait_ready(8.0)
        await fleet.close()

    with _pool(gpus_per_rank=1.0, place_timeout_s=2.0) as supervisor:
        _run(body)
    _wait_all_free()


_OWNER = """
import sys, time
from tensorweave.cluster.gang import GangSpec
from tensorweave.cluster.pool import PoolSpec
from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.ray_session import start_or_join_ray
from tensorweave.cluster.supervisor import start_supervisor
from tensorweave.workers.fake_gang import HashRankWorker
import asyncio

start_or_join_ray(num_cpus=2)
spec = GangSpec(tensor_parallel_size=2, args={"model": "hash"}, start_timeout_s=60.0)
supervisor = start_supervisor([PoolSpec("main", spec)], HashRankWorker)

async def main():
    fleet = WatchedFleet(supervisor)
    await fleet.wait_ready(60.0)
    [pool] = await fleet.describe()
    print(*(rank["pid"] for rank in pool["gangs"][0]["ranks"]), flush=True)
    await asyncio.sleep(120.0)

asyncio.run(main())
"""


def test_nothing_outlives_a_killed_owner_not_even_a_stopped_rank() -> None:
    environment = {**os.environ, "PYTHONPATH": import_root(), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        raylet = psutil.Process(pids[0]).parent()
        assert raylet is not None
        assert raylet.pid != psutil.Process().pid
        ours = [*pids, raylet.pid, *(child.pid for child in _children_named(raylet, "PoolSupervisor"))]
        assert len(ours) == 4
        os.kill(pids[1], signal.SIGSTOP)
    finally:
        owner.kill()
        owner.wait(10.0)
        assert owner.stdout is not None
        owner.stdout.close()
    _wait_gone(ours)
