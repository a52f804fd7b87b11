"""Prefill and decode gangs on a private Ray: the tokens of one engine and of transformers, whatever fails. On CPUs, and
on one GPU that all gangs share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.actor import ActorHandle
from transformers import PreTrainedModel

from tensorweave import LLM, CacheTransceiverConfig, DisaggregatedParams, KvCacheConfig, RequestOutput, SamplingParams
from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.fleet import WatchedFleet
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.guide import Guide
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.protocol import GenerateRequest, Role, SamplingSpec
from tensorweave.cluster.ray_session import start_or_join_ray
from tensorweave.cluster.supervisor import PoolSupervisor
from tensorweave.cluster.supervisor_handle import stop_supervisor
from tensorweave.cluster.supervisor_start import start_supervisor
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import build_policy
from tensorweave.workers.build import build_executor
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.rank import RankWorker
from tensorweave.workers.speculation.pace import TOKENS_PER_PROBE
from tests.router.small_tokenizers import byte_level
from tests.workers.tiny_models import make_model, their_greedy

VOCAB = len(byte_level().backend)
START_TIMEOUT_S = 150.0
WAIT_S = 60.0
MAX_TURNS = 10
QUIET_TURNS = 20
GPU_SHARE = 0.25
"""Of a GPU, per rank: up to three gangs run at once, and tests here compute beside them."""
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GREEDY = SamplingSpec(max_tokens=24)
SAMPLED = SamplingSpec(max_tokens=24, temperature=1.2, top_k=50, seed=11)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PEOPLE = Guide("json_schema", json.dumps({"type": "array", "items": PERSON, "minItems": 500}))

pytestmark = pytest.mark.timeout(400)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 7919 + n * n * 31 + n) % (VOCAB - 3) for n in range(length)]


@dataclass
class Setup:
    """A running service, and the answers that one engine gives."""

    supervisor: ActorHandle[PoolSupervisor]
    model: Path
    theirs: PreTrainedModel
    device: str

    def expected(self, requests: Sequence[GenerateRequest]) -> list[list[int]]:
        executor = build_executor(TorchLlmArgs(**args_of(self.model, self.device)), SoloComm())
        executor.start()
        try:
            answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
            executor.enqueue_requests([replace(request, grace_s=0.0) for request in requests])
            num_open = len(requests)
            while num_open:
                for chunk in executor.await_responses(timeout_s=30.0):
                    answers[chunk.request_id] += chunk.token_ids
                    num_open -= chunk.is_last
            return list(answers.values())
        finally:
            executor.shutdown()


def args_of(model: Path, device: str, **more: Any) -> dict[str, Any]:
    """On a GPU, steps of both kinds are replayed as CUDA graphs: some chunks fill 128 tokens."""
    return {
        "model": str(model),
        "dtype": "float32",
        "device": device,
        "num_threads": 1,
        "max_num_tokens": 64 if device == "cpu" else 160,
        "max_batch_size": 32,
        "kv_cache_config": {"max_tokens": 16384, "tokens_per_block": 16},
        **more,
    }


def pool_of(role: Role, model: Path, device: str, size: int) -> PoolSpec:
    args = args_of(model, device, cache_transceiver_config={"backend": "DEFAULT"})
    if device == "cpu":
        args["speculative_config"] = {"decoding_type": "NGram", "max_draft_len": 4}
    share = 0.0 if device == "cpu" else GPU_SHARE
    gang = GangSpec(role=role, mesh=Mesh(tensor=size), args=args, gpus_per_rank=share, start_timeout_s=START_TIMEOUT_S)
    return PoolSpec(role, gang, max_faults=100)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """On CPUs one prefill rank and two decode ranks, of 9 heads over 3: neither size divides them alike; with drafts,
    which the engine that answers are compared with has not. On a GPU, one rank of each role."""
    model, device = tmp_path_factory.mktemp("model"), request.param
    theirs = make_model("llama_tied_9_over_3", model, eos_token_id=None, head_dim=16, vocab_size=VOCAB)
    byte_level().backend.save_pretrained(model)
    with start_or_join_ray(num_cpus=8):
        pools = [pool_of("prefill", model, device, 1), pool_of("decode", model, device, 2 if device == "cpu" else 1)]
        supervisor = start_supervisor(pools, RankWorker)
        try:
            yield Setup(supervisor, model, theirs, device)
        finally:
            stop_supervisor(supervisor)


@contextlib.asynccontextmanager
async def routed(setup: Setup) -> AsyncIterator[tuple[WatchedFleet, Dispatcher]]:
    """A router: its fleet with a gang of each role and the link between them, and its dispatcher, which hands prompts
    over whatever speeds it has seen."""
    fleet = WatchedFleet(setup.supervisor)
    try:
        await fleet.wait_ready(START_TIMEOUT_S)
        await until(lambda: bool(fleet.links("prefill")), START_TIMEOUT_S)
        await until(lambda: all(link.kv_links for link in fleet.links("decode")), WAIT_S)
        yield fleet, Dispatcher(fleet, build_policy("round_robin"))
    finally:
        await fleet.close()


async def until(holds: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.02)


async def tokens_of(dispatcher: Dispatcher, request: GenerateRequest, tokens: list[int] | None = None) -> list[int]:
    tokens = [] if tokens is None else tokens
    async for chunk in dispatcher.generate(request):
        assert chunk.start == len(tokens)
        tokens += chunk.token_ids
    return tokens


def run(body: Callable[[], Awaitable[None]], timeout_s: float = 300.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await body()

    asyncio.run(bounded())


async def pools_of(fleet: WatchedFleet) -> list[dict[str, Any]]:
    """The supervisor's description of the pools; waits if it is slow."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(NotReady):
                return await fleet.describe()
            await asyncio.sleep(0.1)


async def pids_of(fleet: WatchedFleet, role: Role) -> list[int]:
    return [
        rank["pid"]
        for pool in await pools_of(fleet)
        if pool["role"] == role
        for gang in pool["gangs"]
        if gang["state"] == "ready"
        for rank in gang["ranks"]
    ]


async def ready_pids_of(fleet: WatchedFleet, role: Role) -> list[int]:
    """The same once there are some."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while not (pids := await pids_of(fleet, role)):
            await asyncio.sleep(0.1)
    return pids


async def gauges_of(fleet: WatchedFleet, role: Role) -> dict[str, float]:
    """The gauges of the first rank of the first gang, from its last heartbeat."""
    for pool in await pools_of(fleet):
        if pool["role"] == role:
            gauges: dict[str, float] = pool["gangs"][0]["ranks"][0]["gauges"]
            return gauges
    raise AssertionError(f"no {role} pool")


@dataclass
class Running:
    """A running request, and the tokens received so far."""

    dispatcher: Dispatcher
    request: GenerateRequest
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task = asyncio.create_task(tokens_of(self.dispatcher, self.request, self.tokens))


async def answers_of(jobs: Sequence[Running]) -> list[list[int]]:
    return await asyncio.gather(*(job.task for job in jobs))


async def until_quiet(jobs: Sequence[Running]) -> None:
    """Until no token comes in many turns of this loop. Seconds would say nothing where this process stands still."""
    num_turns, before = 0, [-1]
    while num_turns < QUIET_TURNS:
        await asyncio.sleep(0.005)
        now = [len(job.tokens) for job in jobs]
        num_turns, before = num_turns + 1 if now == before else 0, now


async def kill_midway(
    find_pid: Callable[[], Awaitable[int]],
    start: Callable[[str], list[Running]],
    is_midway: Callable[[list[Running]], bool],
    how: signal.Signals = signal.SIGKILL,
) -> list[Running]:
    """Kill a process in the midst of the jobs that `start` has made. It is stopped first (by SIGSTOP it stays so), so
    that what was so then stays so; jobs that were over before are begun anew, under another name."""
    for turn in range(MAX_TURNS):
        pid, jobs = await find_pid(), start(f"turn-{turn}")
        await until(lambda jobs=jobs: is_midway(jobs) or all(job.task.done() for job in jobs), WAIT_S)
        await asyncio.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await until_quiet(jobs)  # what it had said by then is heard
            if is_midway(jobs):
                os.kill(pid, how)
                return jobs
            os.kill(pid, signal.SIGCONT)
        await answers_of(jobs)
    raise AssertionError(f"in none of {MAX_TURNS} turns it was in the midst of anything")


def test_pairs_answer_as_one_engine(setup: Setup) -> None:
    lengths = (1, 15, 16, 17, 64, 65, 200, 700, 1500)
    requests = [
        GenerateRequest(f"equal-{n}-{kind}", prompt_of(length, n), spec)
        for n, length in enumerate(lengths)
        for kind, spec in (("greedy", GREEDY), ("sampled", SAMPLED))
    ]
    expected = setup.expected(requests)
    assert expected[::2] == their_greedy(setup.theirs, [prompt_of(length, n) for n, length in enumerate(lengths)], 24)
    # Its prompt has every token, so that each of its steps can draft; it is long enough for a draft that does not pay.
    drafted = GenerateRequest("drafted", list(range(VOCAB)), replace(GREEDY, max_tokens=2 * TOKENS_PER_PROBE))
    [expected_drafted] = setup.expected([drafted])

    async def body() -> None:
        async with routed(setup) as (fleet, dispatcher):
            for _ in range(2):  # prefix caches cold, then warm
                answers = await asyncio.gather(*(tokens_of(dispatcher, request) for request in requests))
                assert answers == expected
            assert dispatcher.counts.routes["joint"] > 0
            assert not dispatcher.counts.retries
            [link] = fleet.links("decode")[0].kv_links.values()
            assert link.bytes_per_s > 0
            assert link.latency_s > 0
            give_up_s = asyncio.get_running_loop().time() + WAIT_S
            while not are_leases_over(await gauges_of(fleet, "prefill"), sum(n for n in lengths if n >= 64)):
                assert asyncio.get_running_loop().time() < give_up_s, "leases end"
                await asyncio.sleep(0.1)
            if setup.device == "cpu":
                assert await tokens_of(dispatcher, drafted) == expected_drafted
                give_up_s = asyncio.get_running_loop().time() + WAIT_S
                while not (await gauges_of(fleet, "decode"))["draft_tokens_total"]:
                    assert asyncio.get_running_loop().time() < give_up_s, "heartbeats tell of drafts"
                    await asyncio.sleep(0.1)
                assert (await gauges_of(fleet, "prefill"))["draft_tokens_total"] == 0

    run(body)


def are_leases_over(gauges: dict[str, float], num_computed: int) -> bool:
    """Nothing is kept any more of all these tokens, which have been computed."""
    return gauges["computed_prompt_tokens_total"] >= num_computed and not gauges["kv_cache_usage_perc"]


def start_all(dispatcher: Dispatcher, requests: Sequence[GenerateRequest], name: str) -> list[Running]:
    """Every request with a cache of its own."""
    return [
        Running(dispatcher, replace(request, request_id=f"{request.request_id}-{name}", cache_salt=name))
        for request in requests
    ]


def test_the_death_of_a_prefill_gang_changes_no_token(setup: Setup) -> None:
    count = 3 if setup.device == "cpu" else 24  # for a second: the process that is to be killed is stopped before
    requests = [GenerateRequest(f"p-lost-{n}", prompt_of(3000, 50 + n), GREEDY) for n in range(count)]
    expected = setup.expected(requests)

    async def body() -> None:
        async with routed(setup) as (fleet, dispatcher):

            async def find_pid() -> int:
                [pid] = await ready_pids_of(fleet, "prefill")
                return pid

            def is_midway(jobs: list[Running]) -> bool:
                return any(link.num_inflight > 0 for link in fleet.links("prefill"))

            jobs = await kill_midway(find_pid, lambda name: start_all(dispatcher, requests, name), is_midway)
            assert await answers_of(jobs) == expected
            await until(lambda: bool(fleet.links("prefill")), START_TIMEOUT_S)

    run(body)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_decode_gang_changes_no_token(setup: Setup, rank: int) -> None:
    if rank and setup.device != "cpu":
        pytest.skip("gangs that share a GPU have one rank")
    long = replace(SAMPLED, max_tokens=400 if setup.device == "cpu" else 3000)
    specs = [long, long, replace(long, temperature=1.0, guide=PEOPLE)]  # the last is in the midst of an object
    requests = [GenerateRequest(f"d-lost-{rank}-{n}", prompt_of(100, 90 + n), spec) for n, spec in enumerate(specs)]
    expected = setup.expected(requests)
    assert byte_level().decode(expected[-1]).startswith("[")

    async def body() -> None:
        async with routed(setup) as (fleet, dispatcher):

            async def find_pid() -> int:
                return (await ready_pids_of(fleet, "decode"))[rank]

            def is_midway(jobs: list[Running]) -> bool:
                return all(0 < len(job.tokens) < long.max_tokens - 100 for job in jobs)

            num_before: list[int] = []

            def start(name: str) -> list[Running]:
                num_before.append(dispatcher.counts.num_recovered)
                return start_all(dispatcher, requests, name)

            jobs = await kill_midway(find_pid, start, is_midway)
            async with asyncio.timeout(START_TIMEOUT_S):  # a new gang starts first
                assert await answers_of(jobs) == expected
            assert dispatcher.counts.num_recovered - num_before[-1] == len(jobs)

    run(body)


def test_scaling_down_moves_or_finishes_running_requests(setup: Setup) -> None:
    requests = [
        GenerateRequest(f"scale-{n}", prompt_of(80, 130 + n), replace(GREEDY, max_tokens=300)) for n in range(6)
    ]
    expected = setup.expected(requests)

    async def body() -> None:
        async with routed(setup) as (fleet, dispatcher):
            await setup.supervisor.scale.remote("decode", 2, 20.0)
            await until(lambda: len(fleet.links("decode")) == 2, START_TIMEOUT_S)
            jobs = [Running(dispatcher, request) for request in requests]
            await until(lambda: all(job.tokens for job in jobs), WAIT_S)
            await setup.supervisor.scale.remote("decode", 1, 0.2)
            assert await answers_of(jobs) == expected
            await until(lambda: len(fleet.links("decode")) == 1, WAIT_S)

    run(body)


def test_another_router_resumes_requests_of_a_lost_one(setup: Setup) -> None:
    request = GenerateRequest("named", prompt_of(120, 7), replace(SAMPLED, max_tokens=600), grace_s=WAIT_S)
    [expected] = setup.expected([request])

    async def body() -> None:
        async with routed(setup) as (lost, first), routed(setup) as (fleet, second):
            seen: list[int] = []
            async for chunk in first.generate(request):
                seen += chunk.token_ids
                if len(seen) > 20:
                    break_links(lost)
                    break
            assert await tokens_of(second, request) == expected
            assert second.counts.num_reattached == 1
            assert fleet.links("decode")[0].num_inflight == 0

    run(body)


def break_links(fleet: WatchedFleet) -> None:
    """Close the connections without cancelling anything, as when the process is killed."""
    for link in fleet.links("prefill"):
        link.close()
    for link in fleet.links("decode"):
        link.close()


def test_the_service_goes_on_without_a_prefill_gang(setup: Setup) -> None:
    request = GenerateRequest("no-prefill", prompt_of(500, 3), GREEDY)
    [expected] = setup.expected([request])

    async def body() -> None:
        async with routed(setup) as (fleet, dispatcher):
            await setup.supervisor.scale.remote("prefill", 0, 5.0)
            await until(lambda: not fleet.links("prefill"), WAIT_S)
            await fleet.wait_ready(0.0)
            assert await tokens_of(dispatcher, request) == expected
            await setup.supervisor.scale.remote("prefill", 1, 5.0)
            await until(lambda: bool(fleet.links("prefill")), START_TIMEOUT_S)

    run(body)


def test_two_llms_by_hand_one_of_them_a_gang(setup: Setup) -> None:
    if setup.device != "cpu":
        pytest.skip("two ranks of a gang need a GPU each")
    exchange = CacheTransceiverConfig(backend="DEFAULT")
    cache = KvCacheConfig(max_tokens=4096, tokens_per_block=16)
    knobs: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_config": cache}
    params = SamplingParams(max_tokens=16, temperature=1.2, top_k=50, seed=11, ignore_eos=True, detokenize=False)
    prompts = [prompt_of(300, 21), prompt_of(37, 22)]
    with (
        LLM(setup.model, skip_tokenizer_init=True, cache_transceiver_config=exchange, **knobs) as alone,
        LLM(
            setup.model,
            skip_tokenizer_init=True,
            cache_transceiver_config=exchange,
            tensor_parallel_size=2,
            **knobs,
        ) as gang,
    ):
        assert len(gang.disaggregated_params["endpoints"]) == 2
        assert gang.disaggregated_params["fingerprint"] == alone.disaggregated_params["fingerprint"]
        expected = token_ids(alone.generate(prompts, params, use_tqdm=False))
        for first, second in ((alone, gang), (gang, alone)):
            contexts = first.generate(
                prompts, params, use_tqdm=False, disaggregated_params=DisaggregatedParams(request_type="context_only")
            )
            assert isinstance(contexts, list)
            phases = [context.outputs[0].disaggregated_params for context in contexts]
            handed = [replace(phase, request_type="generation_only") for phase in phases if phase is not None]
            answers = second.generate(prompts, params, use_tqdm=False, disaggregated_params=handed)
            assert token_ids(answers) == expected


def token_ids(outputs: RequestOutput | list[RequestOutput]) -> list[list[int]]:
    assert isinstance(outputs, list)
    return [output.outputs[0].token_ids for output in outputs]
