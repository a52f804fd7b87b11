"""A pool's gang of two ranks under a private Ray: right tokens, clear errors, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import psutil
import pytest
import ray
from ray.actor import ActorHandle

from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.cluster.ray_session import import_root, start_or_join_ray
from tensorweave.cluster.service_state import DetachedSpec
from tensorweave.cluster.supervisor import PoolSupervisor
from tensorweave.cluster.supervisor_handle import find_supervisor, stop_supervisor
from tensorweave.cluster.supervisor_start import find_or_start_supervisor, start_supervisor
from tensorweave.workers.fakes.fake_engine import hash_token
from tensorweave.workers.fakes.fake_gang import HashRankWorker
from tests.e2e.service_process import alive, command_of, wait_until

VOCAB_SIZE = 1000
PROMPT = [11, 22, 33]
FAULT_TO_ERROR_S = 10.0
READY_TIMEOUT_S = 240.0
GONE_TIMEOUT_S = 60.0
LONG = 500  # tokens: four such fill a gang, and at 100 ms a token outlast whatever a test waits for

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def _ray_session() -> Iterator[None]:
    with start_or_join_ray(num_cpus=4):
        yield


@contextlib.contextmanager
def _pool(replicas: int = 1, **gang: Any) -> Iterator[ActorHandle[PoolSupervisor]]:
    gang = {"mesh": Mesh(tensor=2), "args": {"model": "hash"}, "start_timeout_s": READY_TIMEOUT_S, **gang}
    supervisor = start_supervisor([PoolSpec("main", GangSpec(**gang), replicas, max_faults=20)], HashRankWorker)
    try:
        yield supervisor
    finally:
        stop_supervisor(supervisor)


@contextlib.asynccontextmanager
async def _fleet(supervisor: ActorHandle[PoolSupervisor]) -> AsyncIterator[WatchedFleet]:
    fleet = WatchedFleet(supervisor)
    try:
        await fleet.wait_ready(READY_TIMEOUT_S)
        yield fleet
    finally:
        await fleet.close()


def _run(body: Callable[[], Awaitable[None]], timeout_s: float = 300.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await body()

    asyncio.run(bounded())


def _oracle(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


async def _generate(
    fleet: WatchedFleet,
    request_id: str,
    num_tokens: int,
    prompt: Sequence[int] = PROMPT,
    has_begun: asyncio.Event | None = None,
) -> list[int]:
    request = GenerateRequest(request_id, list(prompt), SamplingSpec(max_tokens=num_tokens))
    tokens: list[int] = []
    async for chunk in fleet.links()[0].generate(request):
        tokens += chunk.token_ids
        if has_begun is not None:
            has_begun.set()
    return tokens


async def _begin(
    fleet: WatchedFleet, request_id: str, num_tokens: int, prompt: Sequence[int] = PROMPT
) -> asyncio.Task[list[int]]:
    """The same, once the first token has arrived."""
    has_begun = asyncio.Event()
    running = asyncio.create_task(_generate(fleet, request_id, num_tokens, prompt, has_begun))
    begun = asyncio.create_task(has_begun.wait())
    await asyncio.wait({running, begun}, return_when=asyncio.FIRST_COMPLETED)
    begun.cancel()
    return running


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.05)


async def _wait_successor(fleet: WatchedFleet, old_id: str) -> None:
    await _until(lambda: old_id not in [link.gang_id for link in fleet.links()])
    await fleet.wait_ready(READY_TIMEOUT_S)


async def _rank_pids(fleet: WatchedFleet) -> list[int]:
    while True:
        with contextlib.suppress(NotReady):  # it is slow to answer
            [pool] = await fleet.describe()
            return [rank["pid"] for gang in pool["gangs"] for rank in gang["ranks"]]
        await asyncio.sleep(0.1)


async def _pids_without(fleet: WatchedFleet, old: Sequence[int]) -> list[int]:
    """The ranks' processes, once none of the old ones is listed: a gang that drains is listed until it has ended."""
    while set(pids := await _rank_pids(fleet)) & set(old):
        await asyncio.sleep(0.05)
    return pids


def _wait_gone(pids: Sequence[int]) -> None:
    processes = [process for pid in pids for process in _processes(pid)]
    wait_until(lambda: not alive(processes), GONE_TIMEOUT_S, f"{processes} are gone")


def _processes(pid: int) -> list[psutil.Process]:
    """The process, or None."""
    try:
        return [psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return []


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def _wait_all_free() -> None:
    num_cpus = ray.cluster_resources()["CPU"]
    wait_until(lambda: _free_cpus() >= num_cpus, GONE_TIMEOUT_S, f"all {num_cpus} CPUs are free again")


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
            running = await _begin(fleet, "last", 200)
            await supervisor.drain.remote(GONE_TIMEOUT_S)
            assert await running == _oracle(PROMPT, 200)
            await _until(lambda: fleet.links() == [])

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
            jobs = [await _begin(fleet, f"r{n}", LONG, [n, 5]) for n in range(4)]
            os.kill(pids[rank], how)
            told_s, results = await _timed(asyncio.gather(*jobs, return_exceptions=True))
            assert [type(result) for result in results] == [WorkerLost] * 4
            assert told_s < FAULT_TO_ERROR_S
            await _wait_successor(fleet, old_id)
            assert await _generate(fleet, "next", 20) == _oracle(PROMPT, 20)
            seen.extend(await _pids_without(fleet, pids))

    with _pool(worker_options={"step_s": 0.1}) as supervisor:
        _run(body)
    _wait_gone(seen)
    _wait_all_free()


async def _timed(work: asyncio.Future[list[Any]]) -> tuple[float, list[Any]]:
    """Seconds that it took, counted in short waits, because a paused process receives nothing."""
    for num_beats in itertools.count(1):
        done, _ = await asyncio.wait({work}, timeout=0.05)
        if done:
            return num_beats * 0.05, work.result()
    raise AssertionError


def test_a_killed_supervisor_restarts_with_new_gangs() -> None:
    seen: list[int] = []

    async def body() -> None:
        async with _fleet(supervisor) as fleet:
            old = await _rank_pids(fleet)
            seen.extend(old)
            old_id = fleet.links()[0].gang_id
            process = await _supervisor_beside(old[0])
            process.kill()
            await asyncio.to_thread(_wait_gone, old)
            await _wait_successor(fleet, old_id)
            assert await _generate(fleet, "next", 20) == _oracle(PROMPT, 20)
            seen.extend(await _pids_without(fleet, old))

    with _pool() as supervisor:
        _run(body)
    _wait_gone(seen)
    _wait_all_free()


def test_gangs_of_a_service_outlive_their_supervisor_and_are_replaced_when_their_pool_changes() -> None:
    detached = DetachedSpec("test", "tests")
    spec = PoolSpec("main", GangSpec(mesh=Mesh(tensor=2), args={"model": "hash"}, worker_options={"step_s": 0.05}))
    seen: list[int] = []

    async def body() -> None:
        supervisor = find_or_start_supervisor(detached, [spec], HashRankWorker)
        async with _fleet(supervisor) as fleet:
            old = await _rank_pids(fleet)
            seen.extend(old)
            [link] = fleet.links()
            running = await _begin(fleet, "through", 200)
            process = await _supervisor_beside(old[0])
            process.kill()
            await asyncio.to_thread(_wait_gone, [process.pid])
            assert await _rank_pids(fleet) == old
            assert await running == _oracle(PROMPT, 200)
            assert fleet.links() == [link]
            again = find_or_start_supervisor(detached, [spec], HashRankWorker)
            assert again == supervisor
            # What stays the same is left alone, what differs is drained and started anew; a late caller is not heard.
            faster = replace(spec, gang=replace(spec.gang, worker_options={}))
            await again.apply.remote([spec], 1, 60.0)
            assert await _rank_pids(fleet) == old
            last = await _begin(fleet, "last", 20)
            await again.apply.remote([faster], 2, 60.0)
            await again.apply.remote([spec], 1, 60.0)
            assert await last == _oracle(PROMPT, 20)
            await _wait_successor(fleet, link.gang_id)
            assert await _generate(fleet, "next", 20) == _oracle(PROMPT, 20)
            seen.extend(await _pids_without(fleet, old))

    try:
        _run(body)
    finally:
        stop_supervisor(find_supervisor(detached))
    _wait_gone(seen)
    _wait_all_free()


async def _supervisor_beside(pid: int) -> psutil.Process:
    """Of the Ray that this rank is of, once those of the tests before have ended."""
    parent = psutil.Process(pid).parent()
    while len(found := _children_named(parent, "PoolSupervisor")) != 1:
        await asyncio.sleep(0.05)
    return found[0]


def _children_named(parent: psutil.Process | None, name: str) -> list[psutil.Process]:
    """Ray names an actor's process after its class."""
    assert parent is not None
    return [child for child in parent.children() if name in command_of(child)]


@pytest.mark.parametrize(
    ("gang", "reason"),
    [
        ({"args": {"model": "refused"}}, "model 'refused' is refused"),
        (
            {"worker_options": {"package_version": "0.0.9"}},
            r"rank 0 .* has tensorweave 0\.0\.9 .*; rank 1 .*; the supervisor has .* same version on every host",
        ),
    ],
)
def test_a_permanent_error_fails_the_pool_at_once(gang: dict[str, Any], reason: str) -> None:
    async def body() -> None:
        fleet = WatchedFleet(supervisor)
        began_s = time.monotonic()
        with pytest.raises(NotReady, match=reason):
            await fleet.wait_ready(READY_TIMEOUT_S)
        assert time.monotonic() - began_s < READY_TIMEOUT_S, "the pool failed, and nobody waited in vain"
        await fleet.close()

    with _pool(**gang) as supervisor:
        _run(body)
    _wait_all_free()


def test_a_gang_that_cannot_be_placed_says_what_is_missing() -> None:
    async def body() -> None:
        fleet = WatchedFleet(supervisor)
        missing = re.compile(r"2 rank.* with 1 CPU, 1 GPU each .* 0 of 0 GPU free.* missing: 2 GPU")
        reason, give_up_s = "", time.monotonic() + READY_TIMEOUT_S
        while not missing.search(reason):  # at first it may be about resources of the tests before
            assert time.monotonic() < give_up_s, reason
            with pytest.raises(NotReady) as refusal:
                await fleet.wait_ready(1.0)
            reason = str(refusal.value)
            await asyncio.sleep(0.1)  # of a pool that has failed it is told at once
        await fleet.close()

    with _pool(gpus_per_rank=1.0, place_timeout_s=2.0) as supervisor:
        _run(body)
    _wait_all_free()


_OWNER = """
import sys, time
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.ray_session import start_or_join_ray
from tensorweave.cluster.supervisor_start import start_supervisor
from tensorweave.workers.fakes.fake_gang import HashRankWorker
import asyncio

start_or_join_ray(num_cpus=2)
spec = GangSpec(mesh=Mesh(tensor=2), args={"model": "hash"}, start_timeout_s=120.0)
supervisor = start_supervisor([PoolSpec("main", spec)], HashRankWorker)

async def main():
    fleet = WatchedFleet(supervisor)
    await fleet.wait_ready(120.0)
    [pool] = await fleet.describe()
    print(*(rank["pid"] for rank in pool["gangs"][0]["ranks"]), flush=True)
    await asyncio.sleep(600.0)

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
        owner.wait(GONE_TIMEOUT_S)
        assert owner.stdout is not None
        owner.stdout.close()
    _wait_gone(ours)
