"""The LLM class with more than one rank: what is sent to the ranks through Ray, also to those of a replacement gang."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, GuidedDecodingParams, SamplingParams
from tensorweave.cluster.errors import NotReady
from tests.llmapi.small_llm import CACHE, one, write_small_model
from tests.workers.engine_drive import random_prompts
from tests.workers.tiny_models import make_model, their_greedy

PROMPT = [9, 8, 7]
PATIENCE_S = 120.0


def counting_up(hurry: Path | None = None) -> Callable[..., None]:
    """Forces the token 20 + length; slowly, until the file `hurry` is there. Made here, so that it goes to the ranks by
    value."""

    def processor(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        import time

        if hurry is not None and not hurry.exists():
            time.sleep(0.15)
        logits[..., 20 + len(token_ids[0])] += 1000.0

    return processor


def dawdling(hurry: Path) -> Callable[..., None]:
    """Changes nothing, slowly, until the file `hurry` is there."""

    def processor(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        import time

        if not hurry.exists():
            time.sleep(0.1)

    return processor


def banning_even() -> Callable[..., None]:
    def processor(req_ids: list[int], logits: list[Any], *others: Any) -> None:
        for row in logits:
            row[..., ::2] = float("-inf")

    return processor


def pids_of(llm: LLM) -> list[int]:
    """The process ids of both ranks, once there are two: a gang that is being replaced has none."""
    give_up_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_s:
        with contextlib.suppress(NotReady):
            [pool] = llm._runtime.loop.call(llm._runtime.engine.fleet.describe())
            pids = [rank["pid"] for gang in pool["gangs"] for rank in gang.get("ranks", ())]
            if len(pids) == 2:
                return pids
        time.sleep(0.1)
    raise AssertionError("there are no two ranks")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processors_reach_every_rank_and_a_replaced_gang(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path)
    with LLM(
        directory,
        tensor_parallel_size=2,
        dtype="float32",
        kv_cache_config=CACHE,
        num_threads=1,
        batched_logits_processor=banning_even(),
    ) as llm:
        forced = SamplingParams(max_tokens=5, ignore_eos=True, logits_processor=counting_up())
        odd = SamplingParams(max_tokens=8, ignore_eos=True, apply_batched_logits_processor=True)
        told = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2, return_generation_logits=True, seed=1)
        first, second, third = llm.generate([PROMPT] * 3, [forced, odd, told], use_tqdm=False)  # type: ignore[misc]
        assert first.outputs[0].token_ids == [23, 24, 25, 26, 27]
        assert all(token % 2 for token in second.outputs[0].token_ids)
        assert len(third.outputs[0].logprobs) == len(third.outputs[0].generation_logits) == 4
        lock = threading.Lock()
        with pytest.raises(ValueError, match="lock"):
            llm.generate(PROMPT, SamplingParams(logits_processor=lambda *given: lock))
        hurry = tmp_path / "hurry"
        numbers = GuidedDecodingParams(json={"type": "array", "items": {"type": "integer"}, "minItems": 150})
        object_of = SamplingParams(max_tokens=160, temperature=1.0, seed=3, guided_decoding=numbers)
        expected = one(llm.generate(PROMPT, object_of)).outputs[0].token_ids
        in_object = llm.generate_async(
            PROMPT, dataclasses.replace(object_of, logits_processor=dawdling(hurry)), streaming=True
        )
        next(beginning := iter(in_object))
        slow = SamplingParams(max_tokens=200, ignore_eos=True, logits_processor=counting_up(hurry))
        running = llm.generate_async(PROMPT, slow, streaming=True)
        iterator = iter(running)  # kept: dropping it early would cancel the request
        next(iterator)
        os.kill(pids_of(llm)[1], signal.SIGKILL)
        hurry.touch()
        assert running.result(600).outputs[0].token_ids == list(range(23, 223))
        assert in_object.result(600).outputs[0].token_ids == expected
        del beginning  # kept for the same reason
        assert sum(llm._runtime.dispatcher.counts.retries.values()) >= 1
        assert one(llm.generate(PROMPT, odd)).outputs[0].token_ids == second.outputs[0].token_ids
        rows = asyncio.run(gather(llm))
        assert rows
        assert {"iter", "kvCacheStats"} <= rows[0].keys()


async def gather(llm: LLM) -> list[dict[str, Any]]:
    return [row async for row in llm.get_stats_async(PATIENCE_S)]


@pytest.mark.long("takes a minute")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_experts_of_two_ranks_answer_as_shared_ones_and_as_one_rank(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    prompts: list[Any] = list(random_prompts(12, 120, seed=5))
    expected = their_greedy(model, prompts, 8)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    for mesh in ({}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2}):
        with LLM(
            tmp_path, skip_tokenizer_init=True, device="cpu", dtype="float32", kv_cache_config=CACHE, **mesh
        ) as llm:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        assert isinstance(outputs, list)
        assert [output.outputs[0].token_ids for output in outputs] == expected, mesh
