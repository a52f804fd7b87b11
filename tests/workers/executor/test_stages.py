"""Pipeline stages: the answers of one rank, whatever the stages, the schedule and the requests."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite, WorkerLost
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tests.workers.engine_drive import random_prompts
from tests.workers.executor.test_overlap import mixed_requests, told
from tests.workers.executor_answers import Answers, collect_answers
from tests.workers.stage_gang import StageGang, ThreadStageLink
from tests.workers.tiny_models import MODELS as FAMILIES
from tests.workers.tiny_models import VOCAB, make_model
from tests.workers.waiting import WAIT_S, wait_until

MODELS = {"llama": "llama_tied_9_over_3", "qwen3": "qwen3"}
MESHES = {"pp2": Mesh(pipeline=2), "pp3": Mesh(pipeline=3), "tp2pp2": Mesh(tensor=2, pipeline=2)}
SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked, overlapping": {"max_num_tokens": 24, "disable_overlap_scheduler": False},
    "preempted": {
        "max_batch_size": 6,
        "max_num_tokens": 24,
        "kv_cache_config": {"max_tokens": 96, "tokens_per_block": 4},
        "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, path in paths.items():
        make_model(MODELS[name], path, num_hidden_layers=4)
    return paths


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Answers]:
    wanted = {}
    for name, path in models.items():
        with StageGang(path, Mesh()) as gang:
            wanted[name] = gang.answer(requests())
    return wanted


def requests() -> Sequence[GenerateRequest]:
    return mixed_requests(21, seed=5, vocab=VOCAB, longest=60)


def check_alike(got: Answers, want: Answers) -> None:
    for name in want:
        tokens, logprobs, logits, prompts, *reasons = told(got[name])
        their_tokens, their_logprobs, their_logits, their_prompts, *their_reasons = told(want[name])
        assert (tokens, reasons) == (their_tokens, their_reasons), name
        assert [[each.token_id for each in token] for token in logprobs] == [
            [each.token_id for each in token] for token in their_logprobs
        ]
        assert [len(each) for each in logits] == [len(each) for each in their_logits]
        assert len(prompts) == len(their_prompts)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_stages_answer_as_one_rank(
    model: str, mesh: str, schedule: str, models: dict[str, Path], expected: dict[str, Answers]
) -> None:
    with StageGang(models[model], MESHES[mesh], **SCHEDULES[schedule]) as gang:
        check_alike(gang.answer(requests()), expected[model])
        num_stages, rows = MESHES[mesh].pipeline, gang.leader.get_latest_iteration_stats()
        numbers = [row["inflightBatchingStats"]["microBatchId"] for row in rows]
        assert numbers == [step % num_stages for step in range(len(rows))]
        wait_until(lambda: gang.leader.gauges()["stage_0_computed"] >= len(rows))  # noted behind a step's result
        assert bool(gang.leader.gauges()["num_preemptions_total"]) == (schedule == "preempted")


def test_steps_of_different_requests_are_in_flight_at_once(models: dict[str, Path]) -> None:
    """Behind the prompts, which are one step, stage 1 begins none before stage 0 has computed the one after it."""
    with StageGang(models["llama"], Mesh(pipeline=2)) as gang:
        first, second = (comm.stages for comm in gang.comms)
        assert isinstance(first, ThreadStageLink)
        receive, received = second.receive_states, itertools.count(1)

        def receive_late(x_TD: Tensor) -> Tensor:
            number = next(received)
            wait_until(lambda: number == 1 or number > 30 or len(first.num_tokens) > number)
            return receive(x_TD)

        second.receive_states = receive_late  # type: ignore[method-assign]
        prompts = random_prompts(5, 20)
        answers = gang.answer([GenerateRequest(f"r{i}", p, SamplingSpec(40)) for i, p in enumerate(prompts)])
        assert all(sum(len(chunk.token_ids) for chunk in chunks) == 40 for chunks in answers.values())
        assert first.num_tokens[1:31] == [3, 2] * 15, "five requests decode in turns"


def test_chunks_of_one_prompt_are_in_flight_at_once(models: dict[str, Path]) -> None:
    prompt = random_prompts(1, 200, seed=8)[0] * 3
    request = GenerateRequest("r", prompt, SamplingSpec(6, temperature=1.0, seed=3))
    with StageGang(models["qwen3"], Mesh()) as gang:
        want = gang.answer([request])
    with StageGang(models["qwen3"], Mesh(pipeline=3), max_num_tokens=16) as gang:
        first, second, _ = (comm.stages for comm in gang.comms)
        assert isinstance(first, ThreadStageLink)
        receive, received = second.receive_states, itertools.count(3)
        num_chunks = -(-len(prompt) // 16)

        def receive_late(x_TD: Tensor) -> Tensor:
            ahead = min(next(received), num_chunks)
            wait_until(lambda: len(first.num_tokens) >= ahead)
            return receive(x_TD)

        second.receive_states = receive_late  # type: ignore[method-assign]
        check_alike(gang.answer([request]), want)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_prompts_beginning_is_found_again(mesh: str, models: dict[str, Path]) -> None:
    prompt = random_prompts(1, 100, seed=2)[0] * 2 + [7] * 40
    request = GenerateRequest("a", prompt, SamplingSpec(9))
    again = dataclasses.replace(request, request_id="b")
    with StageGang(models["llama"], MESHES[mesh]) as gang:
        [first], [second] = gang.answer([request]).values(), gang.answer([again]).values()
        assert first[-1].num_cached_tokens == 0
        assert second[-1].num_cached_tokens >= len(prompt) // 16 * 16 - 16
        assert told(second)[0] == told(first)[0]


@pytest.mark.long("every family takes a second")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path)
    prompts = random_prompts(5, 90, seed=3)
    asked = [GenerateRequest(f"r{i}", prompt, SamplingSpec(12)) for i, prompt in enumerate(prompts)]
    answers = []
    for mesh in (Mesh(), *MESHES.values()):
        with StageGang(tmp_path, mesh, max_num_tokens=64) as gang:
            chunks = gang.answer(asked)
            answers.append([told(chunks[each.request_id])[0] for each in asked])
    assert answers[1:] == answers[:1] * len(MESHES)


def test_embeddings_come_from_the_last_stage(models: dict[str, Path]) -> None:
    spec = SamplingSpec(max_tokens=1, wants_embedding=True)
    requests = [GenerateRequest(f"r{n}", prompt, spec) for n, prompt in enumerate(random_prompts(4, 100, seed=9))]
    vectors = []
    for mesh in (Mesh(), Mesh(tensor=2, pipeline=2)):
        with StageGang(models["llama"], mesh, max_num_tokens=64) as gang:
            answers = gang.answer(requests)
            packed = [b"".join(chunk.context_logits for chunk in answers[each.request_id]) for each in requests]
            vectors.append(torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.float32))
    assert vectors[0].numel() % len(requests) == 0
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-4, atol=1e-4)


def test_a_cancelled_request_leaves_nothing(models: dict[str, Path]) -> None:
    """The gang stands still in the middle of their answers until they are cancelled."""
    with StageGang(models["llama"], Mesh(pipeline=3)) as gang:
        gate, link, received = threading.Event(), gang.comms[1].stages, itertools.count(1)
        receive = link.receive_states

        def receive_late(x_TD: Tensor) -> Tensor:
            assert next(received) < 10 or gate.wait(WAIT_S)
            return receive(x_TD)

        link.receive_states = receive_late  # type: ignore[method-assign]
        prompts = random_prompts(4, 20)
        gang.leader.enqueue_requests([GenerateRequest(f"r{i}", p, SamplingSpec(2000)) for i, p in enumerate(prompts)])
        gang.start()
        names = {f"r{i}" for i in range(len(prompts))}
        told_of = {chunk.request_id for chunk in gang.leader.await_responses(timeout_s=WAIT_S)}
        assert told_of <= names
        for name in names:
            assert gang.leader.cancel_request(name)
        gate.set()
        ends = collect_answers(gang.leader, sorted(names))
        assert {chunks[-1].finish_reason for chunks in ends.values()} == {"cancelled"}
        [answer] = gang.answer([GenerateRequest("after", prompts[0], SamplingSpec(5))]).values()
        assert len(told(answer)[0]) == 5


def test_logits_that_are_not_finite_are_an_error_of_their_request(models: dict[str, Path], tmp_path: Path) -> None:
    """The embedding of one token is NaN, which only the last stage sees; every stage wipes what it has computed."""
    poison = 13
    make_model("qwen3", tmp_path, num_hidden_layers=4)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][poison] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with StageGang(tmp_path, Mesh(pipeline=2)) as gang:
        bad, good = [5] * 20 + [poison], [5] * 20 + [6]
        answers = gang.answer(
            [GenerateRequest("bad", bad, SamplingSpec(5)), GenerateRequest("good", good, SamplingSpec(5))]
        )
        assert isinstance(answers["bad"][-1].error, LogitsNotFinite)
        assert len(told(answers["good"])[0]) == 5
        for rank in gang.ranks:
            wait_until(lambda rank=rank: not rank._engine.pool.cache.isnan().any())


def test_an_error_of_a_stage_ends_its_rank_and_then_its_peers(models: dict[str, Path]) -> None:
    gang = StageGang(models["llama"], Mesh(pipeline=2))
    first, second = gang.ranks
    near, far = (comm.stages for comm in gang.comms)

    def fail(x_TD: Tensor) -> Tensor:
        raise WorkerLost("the other stage is gone")

    near.send_states = far.receive_states = fail  # type: ignore[assignment, method-assign]
    gang.leader.enqueue_request(GenerateRequest("r", [1, 2, 3], SamplingSpec(3)))
    gang.start()
    [chunk] = collect_answers(first, ["r"])["r"]
    assert "the other stage is gone" in str(chunk.error)
    wait_until(lambda: first.failure is not None and second.failure is not None)
    assert not first.is_alive


def test_a_rank_tells_that_it_waits_for_another_stage(models: dict[str, Path]) -> None:
    """The stage that is waited for stands still and does not say so."""
    with StageGang(models["llama"], Mesh(pipeline=2)) as gang:
        first, second = gang.ranks
        gate, link = threading.Event(), gang.comms[1].stages
        receive = link.receive_states

        def receive_late(x_TD: Tensor) -> Tensor:
            assert gate.wait(WAIT_S)
            return receive(x_TD)

        link.receive_states = receive_late  # type: ignore[method-assign]
        first.enqueue_request(GenerateRequest("r", [1, 2, 3], SamplingSpec(3)))
        gang.start()
        wait_until(lambda: first.waits_for_stage)
        wait_until(lambda: min(rank.heartbeat() for rank in gang.ranks) > 0.2)
        assert (first.waits_for_stage, second.waits_for_stage) == (True, False)
        gate.set()
        assert len(told(collect_answers(first, ["r"])["r"])[0]) == 3
