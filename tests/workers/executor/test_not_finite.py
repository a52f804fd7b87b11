"""Requests whose logits are NaN: an error of theirs alone, nothing left behind, a gang that ends if it is to blame."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite, TensorweaveError, WorkerLost
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.logits_watch import NUM_PROBES, PATIENCE
from tensorweave.workers.fakes.fake_engine import HashEngine, HashStep
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.step.pending import StepLogits
from tensorweave.workers.step.plan import PromptRead
from tests.workers.engine_drive import random_prompts
from tests.workers.executor.test_executor import VOCAB, ask, collect, ids, is_idle, make, oracle
from tests.workers.tiny_models import make_model, their_greedy
from tests.workers.transfer_drive import Gang, model_gang, request_pair, tcp_carriers
from tests.workers.waiting import WAIT_S, wait_until

POISON = 13
GOOD, BAD = [4, 7, 3], [4, POISON, 3]


class PoisonedEngine(HashEngine):
    """NaN after every context that has the poison in it, and, when `is_sick`, after every other one too."""

    def __init__(self, *arguments: Any, **knobs: Any) -> None:
        super().__init__(*arguments, **knobs)
        self.is_sick = False
        self.is_cured = False
        self.num_forwards = 0

    def compute(self, step: HashStep) -> StepLogits:
        self.num_forwards += 1
        return super().compute(step)

    def logits_after(self, context: list[int]) -> Tensor:
        logits_V = super().logits_after(context)
        return logits_V * torch.nan if self.is_sick or (POISON in context and not self.is_cured) else logits_V


@pytest.fixture
def engine() -> PoisonedEngine:
    return PoisonedEngine(VOCAB, 64, tokens_per_block=4)


def error_of(chunks: Sequence[TokenChunk]) -> TensorweaveError | None:
    return chunks[-1].error


def test_it_is_an_error_of_that_request_alone(engine: PoisonedEngine, caplog: pytest.LogCaptureFixture) -> None:
    executor = make(engine=engine)
    penalised = GenerateRequest("penalised", BAD, SamplingSpec(8, repetition_penalty=1.5))
    executor.enqueue_requests([ask("good", GOOD, 20), ask("bad", BAD), penalised])
    with caplog.at_level(logging.ERROR):
        executor.start()
        chunks = collect(executor, {"good", "bad", "penalised"})
    assert ids(chunks["good"]) == oracle(GOOD, 20)
    for name in ("bad", "penalised"):
        [chunk] = chunks[name]
        assert isinstance(chunk.error, LogitsNotFinite)
        assert (chunk.token_ids, chunk.finish_reason) == ((), None)
        assert f"request {name}: the logits after 3 prompt and 0 output tokens are not finite" in caplog.text
    assert executor.gauges()["requests_not_finite_total"] == 2
    assert is_idle(executor)
    executor.shutdown()


def test_it_may_come_in_the_middle_of_an_answer(engine: PoisonedEngine) -> None:
    executor = make(engine=engine)
    prompt = next([n] for n in range(20, VOCAB) if POISON in oracle([n], 40)[3:])
    expected = oracle(prompt, 40)
    num_tokens = expected.index(POISON) + 1
    executor.enqueue_request(ask("r", prompt, 40))
    executor.start()
    chunks = collect(executor, {"r"})["r"]
    assert ids(chunks) == expected[:num_tokens]
    assert isinstance(error_of(chunks), LogitsNotFinite)
    assert chunks[-1].start == num_tokens
    executor.shutdown()


@pytest.mark.parametrize("wanted", [{"num_prompt_logprobs": 1}, {"wants_context_logits": True}])
def test_a_prompts_own_logits_are_looked_at_too(wanted: dict[str, Any], engine: PoisonedEngine) -> None:
    """NaN in the middle of a prompt that itself goes on with finite ones."""

    def poisoned(step: HashStep) -> Iterator[tuple[PromptRead, Tensor]]:
        for read, logits_NV in HashEngine._prompt_logits(engine, step):
            for i, position in enumerate(range(read.start, read.stop)):
                logits_NV[i, 5] = torch.nan if read.request.tokens[position] == POISON else 0.0
            yield read, logits_NV

    engine.is_cured, engine._prompt_logits = True, poisoned  # type: ignore[method-assign]
    executor = make(engine=engine, max_num_tokens=4)
    prompts = {"bad": [1, 2, 3, POISON, 5, 6, 7, 8, 9, 10], "good": list(range(20, 30))}
    for name, prompt in prompts.items():
        executor.enqueue_request(GenerateRequest(name, prompt, SamplingSpec(2, **wanted)))
    executor.start()
    chunks = collect(executor, set(prompts))
    assert isinstance(error_of(chunks["bad"]), LogitsNotFinite)
    assert not ids(chunks["bad"])
    assert ids(chunks["good"]) == oracle(prompts["good"], 2)
    assert is_idle(executor)
    executor.shutdown()


def test_what_a_failed_request_computed_is_not_used_again(engine: PoisonedEngine) -> None:
    """A device's passing fault must not live on in the prefix tree."""
    executor = make(engine=engine)
    executor.start()
    prompt = [*range(20, 30), POISON, *range(30, 40)]
    shared = ask("shared", [*prompt[:8], 2], 3)
    executor.enqueue_request(shared)
    collect(executor, {"shared"})
    executor.enqueue_request(ask("bad", prompt))
    [failed] = collect(executor, {"bad"})["bad"]
    assert (failed.num_cached_tokens, type(failed.error)) == (8, LogitsNotFinite)
    engine.is_cured = True
    executor.enqueue_request(ask("again", prompt))
    again = collect(executor, {"again"})["again"]
    assert (again[0].num_cached_tokens, ids(again)) == (0, oracle(prompt, 8))
    executor.enqueue_request(ask("thrice", prompt))
    assert collect(executor, {"thrice"})["thrice"][0].num_cached_tokens == 20
    assert is_idle(executor)
    executor.shutdown()


# ---- whose fault it is


def test_requests_that_always_fail_do_not_take_the_gang_along(
    engine: PoisonedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make(engine=engine)
    executor.start()
    with caplog.at_level(logging.WARNING):
        for i in range(3 * PATIENCE):
            executor.enqueue_request(ask(f"r{i}", BAD))
            assert isinstance(error_of(collect(executor, {f"r{i}"})[f"r{i}"]), LogitsNotFinite)
        wait_until(lambda: "the requests are at fault, and this gang goes on" in caplog.text)
    executor.enqueue_request(ask("good", GOOD, 5))
    assert ids(collect(executor, {"good"})["good"]) == oracle(GOOD, 5)  # `collect` knows no probe: none is answered
    assert executor.gauges()["requests_not_finite_total"] == 3 * PATIENCE
    assert is_idle(executor)
    assert executor.is_alive
    executor.shutdown()


def test_a_gang_that_has_only_nan_left_ends(engine: PoisonedEngine) -> None:
    executor = make(engine=engine)
    executor.start()
    executor.enqueue_request(ask("before", GOOD, 3))
    assert ids(collect(executor, {"before"})["before"]) == oracle(GOOD, 3)
    engine.is_sick = True
    for i in range(PATIENCE):
        executor.enqueue_request(ask(f"r{i}", [4, 7, i]))
        assert isinstance(error_of(collect(executor, {f"r{i}"})[f"r{i}"]), LogitsNotFinite)
    wait_until(lambda: executor.failure is not None)
    assert isinstance(executor.failure, WorkerLost)
    assert executor.failure.message == (
        f"no logits are finite any more: {PATIENCE} steps in a row gave NaN or infinity alone, and so do "
        f"{NUM_PROBES} prompts of one token"
    )
    wait_until(lambda: not executor._thread.is_alive())  # what comes before that is answered with the error
    with pytest.raises(WorkerLost):
        executor.enqueue_request(ask("late", GOOD))


def test_one_finite_row_is_enough(engine: PoisonedEngine) -> None:
    """Beside a request that is well no number of bad ones raises a doubt."""
    executor = make(engine=engine, max_num_tokens=4)  # one decode and one prompt a step
    bad = {f"r{i}" for i in range(4 * PATIENCE)}
    executor.enqueue_requests([ask("good", GOOD, 60), *(ask(name, BAD) for name in sorted(bad))])
    executor.start()
    chunks = collect(executor, {"good", *bad})
    assert ids(chunks["good"]) == oracle(GOOD, 60)
    assert executor._loop.requests.num_arrived == len(bad) + 1  # no probe was begun
    executor.shutdown()


# ---- ranks and pairs of gangs


def nan_checkpoint(path: Path, name: str = "model.embed_tokens.weight", rows: Any = POISON) -> Any:
    """A model of which one tensor has NaN; returns transformers' own without them."""
    model = make_model("llama", path)
    tensors = load_file(path / "model.safetensors")
    tensors[name][rows] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return model


def answers(executor: PyExecutor, prompts: dict[str, Sequence[int]], spec: SamplingSpec) -> dict[str, list[TokenChunk]]:
    for name, prompt in prompts.items():
        executor.enqueue_request(GenerateRequest(name, prompt, spec))
    return collect(executor, set(prompts))


@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_agree_and_no_nan_is_left_in_memory(size: int, tmp_path: Path) -> None:
    model = nan_checkpoint(tmp_path)
    good = {f"good{i}": [t for t in prompt if t != POISON] for i, prompt in enumerate(random_prompts(4, 40))}
    bad = {f"bad{i}": [5, 6, POISON, *range(20, 60)] for i in range(2)}
    expected = dict(zip(good, their_greedy(model, list(good.values()), 6), strict=True))
    with model_gang(tmp_path, size, None, kv_cache_config={"max_tokens": 256}, max_num_tokens=24) as gang:
        for _ in range(3):  # the pool is small: blocks of failed requests are used again
            chunks = answers(gang.leader, {**bad, **good}, SamplingSpec(6))
            assert {name: ids(chunks[name]) for name in good} == expected
            assert all(isinstance(error_of(chunks[name]), LogitsNotFinite) for name in bad)
        gang.wait_idle()
        assert all(rank.is_alive for rank in gang.ranks)
        for rank in gang.ranks:
            assert rank._engine.pool.cache.isfinite().all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 2])
def test_a_broken_checkpoint_ends_every_rank_of_its_gang(size: int, tmp_path: Path) -> None:
    nan_checkpoint(tmp_path, "model.norm.weight", slice(0, 1))
    gang = model_gang(tmp_path, size, None)
    for i in range(PATIENCE):
        chunks = answers(gang.leader, {f"r{i}": [5, 6, i]}, SamplingSpec(4, temperature=1.0))[f"r{i}"]
        assert isinstance(error_of(chunks), LogitsNotFinite)
    for rank in gang.ranks:
        wait_until(lambda rank=rank: rank.failure is not None)  # type: ignore[misc]
        assert isinstance(rank.failure, WorkerLost)
        assert "no logits are finite any more" in rank.failure.message


def poisoned_gang(engines: list[PoisonedEngine]) -> Gang:
    def make_engine(comm: Comm) -> PoisonedEngine:
        engines.append(PoisonedEngine())
        return engines[-1]

    return Gang(make_engine, 1, tcp_carriers)


@pytest.mark.parametrize("is_decode_well", [True, False])
def test_a_prefill_gang_that_gives_nan_hands_nothing_over(is_decode_well: bool) -> None:
    """The decode gang computes the prompt itself: it goes on, or fails with the same error."""
    engines: list[PoisonedEngine] = []
    prompt = [*range(40, 80), POISON, *range(80, 120)]
    with poisoned_gang(engines) as prefill, poisoned_gang(engines) as decode:
        engines[1].is_cured = is_decode_well
        first, second = request_pair("r", prompt, SamplingSpec(5), prefill.source)
        decode.leader.enqueue_request(second)
        prefill.leader.enqueue_request(first)
        assert isinstance(error_of(collect(prefill.leader, {"r/p"}, WAIT_S)["r/p"]), LogitsNotFinite)
        chunks = collect(decode.leader, {"r/d"}, WAIT_S)["r/d"]
        if is_decode_well:
            alone = answers(decode.leader, {"alone": prompt}, SamplingSpec(5))["alone"]
            assert ids(chunks) == ids(alone)
        else:
            assert isinstance(error_of(chunks), LogitsNotFinite)
        prefill.wait_idle()
        decode.wait_idle()
