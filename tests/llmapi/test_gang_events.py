"""KV cache events with more than one rank: the same as with one, from every gang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, KvCacheConfig, SamplingParams
from tests.llmapi.small_llm import write_small_model

PROMPT = [3 + number % 80 for number in range(100)]


def events_of(directory: Path, ranks: int) -> list[dict[str, Any]]:
    config = KvCacheConfig(max_tokens=256, tokens_per_block=32, event_buffer_max_size=1000)
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    with LLM(directory, tensor_parallel_size=ranks, dtype="float32", kv_cache_config=config, num_threads=1) as llm:
        for prompt in (PROMPT, PROMPT, PROMPT[::-1], PROMPT[5:]):  # the last ones need the first one's blocks
            llm.generate(prompt, greedy)
        events = llm.get_kv_cache_events(timeout=60.0)
        assert llm.get_kv_cache_events(timeout=60.0) == []
        return events


@pytest.mark.slow
def test_two_ranks_tell_what_one_tells(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path)
    events = events_of(directory, 2)
    assert {event["data"]["type"] for event in events} == {"created", "stored", "removed"}
    assert events == events_of(directory, 1)
