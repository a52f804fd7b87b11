"""The LLM class above one rank: what reaches the ranks through Ray, also those of a gang that replaces a lost one."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, KvCacheConfig, SamplingParams
from tests.llmapi.small_llm import CACHE, one, write_small_model

PROMPT = [9, 8, 7]


def counting_up(delay_s: float = 0.0) -> Callable[..., None]:
    """Forces the token 20 + length. Made here, so that it goes to the ranks by value."""

    def processor(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        import time

        time.sleep(delay_s)
        logits[..., 20 + len(token_ids[0])] += 1000.0

    return processor


def banning_even() -> Callable[..., None]:
    def processor(req_ids: list[int], logits: list[Any], *others: Any) -> None:
        for row in logits:
            row[..., ::2] = float("-inf")

    return processor


def pids_of(llm: LLM) -> list[int]:
    engine = llm._parts.engine
    [pool] = llm._parts.loop.call(engine.fleet.describe())
    return [rank["pid"] for gang in pool["gangs"] for rank in gang["ranks"]]


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
        slow = SamplingParams(max_tokens=60, ignore_eos=True, logits_processor=counting_up(0.05))
        running = llm.generate_async(PROMPT, slow, streaming=True)
        next(iter(running))
        os.kill(pids_of(llm)[1], signal.SIGKILL)
        assert running.result(240).outputs[0].token_ids == list(range(23, 83))
        assert one(llm.generate(PROMPT, odd)).outputs[0].token_ids == second.outputs[0].token_ids
        rows = asyncio.run(gather(llm))
        assert rows
        assert {"iter", "kvCacheStats"} <= rows[0].keys()


async def gather(llm: LLM) -> list[dict[str, Any]]:
    return [row async for row in llm.get_stats_async()]


def test_events_need_one_rank(tmp_path: Path) -> None:
    config = KvCacheConfig(max_tokens=8192, event_buffer_max_size=10)
    with pytest.raises(ValueError, match="event_buffer_max_size is not supported yet above tensor_parallel_size 1"):
        LLM(write_small_model(tmp_path), tensor_parallel_size=2, kv_cache_config=config)
