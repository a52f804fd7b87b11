"""A gang with pipeline stages on a private Ray: requests go on, with the same tokens, when a stage dies or hangs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.actor import ActorHandle

from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.cluster.ray_session import start_or_join_ray
from tensorweave.cluster.supervisor import PoolSupervisor
from tensorweave.cluster.supervisor_handle import stop_supervisor
from tensorweave.cluster.supervisor_start import start_supervisor
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import build_policy
from tensorweave.workers.build import build_executor
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.rank import RankWorker
from tests.e2e.test_disaggregated import Running, answers_of, kill_midway, ready_pids_of
from tests.workers.engine_drive import random_prompts
from tests.workers.executor_answers import collect_answers
from tests.workers.tiny_models import VOCAB, make_model

START_TIMEOUT_S = 150.0
MESH = Mesh(pipeline=2)
LONG = SamplingSpec(max_tokens=400)
SPECS = [LONG, replace(LONG, temperature=1.2, top_k=50, seed=11), replace(LONG, temperature=0.7, seed=4)]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model("qwen3", directory, num_hidden_layers=4, eos_token_id=None)
    return directory


@pytest.fixture(scope="module")
def supervisor(model: Path) -> Iterator[ActorHandle[PoolSupervisor]]:
    gang = GangSpec(mesh=MESH, args=args_of(model), start_timeout_s=START_TIMEOUT_S)
    with start_or_join_ray(num_cpus=2):
        supervisor = start_supervisor([PoolSpec("main", gang, max_faults=100)], RankWorker)
        try:
            yield supervisor
        finally:
            stop_supervisor(supervisor)


def args_of(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_num_tokens": 64,
        "guided_decoding_backend": None,
        "kv_cache_config": {"max_tokens": 4096, "tokens_per_block": 16},
    }


def answers_of_one_rank(model: Path, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    executor = build_executor(TorchLlmArgs(**args_of(model)), SoloComm())
    executor.start()
    try:
        executor.enqueue_requests([replace(request, grace_s=0.0) for request in requests])
        answers = collect_answers(executor, [request.request_id for request in requests])
        return [[token for chunk in chunks for token in chunk.token_ids] for chunks in answers.values()]
    finally:
        executor.shutdown()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300.0):
            await body()

    asyncio.run(bounded())


def is_midway(jobs: Sequence[Running]) -> bool:
    return all(0 < len(job.tokens) < LONG.max_tokens - 100 for job in jobs)


LONGER = pytest.mark.long("starts a gang of two ranks for each case")
FAULTS = [
    (1, signal.SIGKILL),
    pytest.param(0, signal.SIGKILL, marks=LONGER),
    pytest.param(1, signal.SIGSTOP, marks=LONGER),
]


@pytest.mark.parametrize(("rank", "how"), FAULTS)
def test_a_stage_that_dies_or_hangs_loses_no_request(
    rank: int, how: signal.Signals, model: Path, supervisor: ActorHandle[PoolSupervisor]
) -> None:
    prompts = random_prompts(len(SPECS), 100, seed=7 * rank + how, vocab=VOCAB)
    requests = [
        GenerateRequest(f"r{n}", prompt, spec) for n, (prompt, spec) in enumerate(zip(prompts, SPECS, strict=True))
    ]
    expected = answers_of_one_rank(model, requests)

    async def body() -> None:
        fleet = WatchedFleet(supervisor)
        await fleet.wait_ready(START_TIMEOUT_S)
        dispatcher = Dispatcher(fleet, build_policy("round_robin"))

        num_before: list[int] = []

        def start(name: str) -> list[Running]:
            num_before.append(dispatcher.counts.num_recovered)
            named = [replace(each, request_id=f"{each.request_id}-{name}", cache_salt=name) for each in requests]
            return [Running(dispatcher, request) for request in named]

        old = await ready_pids_of(fleet, "both")
        assert len(old) == MESH.size

        async def find_pid() -> int:
            return (await ready_pids_of(fleet, "both"))[rank]

        jobs = await kill_midway(find_pid, start, is_midway, how)
        async with asyncio.timeout(START_TIMEOUT_S):
            assert await answers_of(jobs) == expected
        assert dispatcher.counts.num_recovered - num_before[-1] == len(jobs)
        new = await ready_pids_of(fleet, "both")
        assert len(new) == MESH.size
        assert not set(old) & set(new)
        await fleet.close()

    run(body)
