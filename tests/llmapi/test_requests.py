"""What a request may say besides its prompt: sampling fields, processors, salt, retention, priority, deadline; what is
refused, and that an LLM works on after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave import (
    LLM,
    CompletionOutput,
    GuidedDecodingParams,
    KvCacheConfig,
    KvCacheRetentionConfig,
    LoRARequest,
    PromptAdapterRequest,
    SamplingParams,
    SchedulingParams,
    TokenRangeRetentionConfig,
)
from tensorweave.cluster.errors import DeadlineExceeded
from tensorweave.cluster.protocol import Retention, RetentionRange
from tensorweave.llmapi.request_types import retention_of
from tests.llmapi.small_llm import one

PROMPT = [9, 8, 7, 30, 31, 32, 9, 8, 7, 60]
FREE = SamplingParams(max_tokens=12, ignore_eos=True)


class BanEven:
    """Batched: no even token ids."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(
        self, req_ids: list[int], logits: list[Any], token_ids: list[Any], stream_ptr: Any, client_ids: list[Any]
    ) -> None:
        assert len(req_ids) == len(logits) == len(token_ids) == len(client_ids)
        self.num_calls += 1
        for row in logits:
            row[..., ::2] = float("-inf")


BAN_EVEN = BanEven()


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    config = KvCacheConfig(max_tokens=8192, event_buffer_max_size=1000)
    with LLM(directory, dtype="float32", kv_cache_config=config, batched_logits_processor=BAN_EVEN) as made:
        yield made


def tokens(llm: LLM, prompt: Any = PROMPT, **fields: Any) -> list[int]:
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **fields})
    return one(llm.generate(prompt, params)).outputs[0].token_ids


def test_penalties_biases_and_bad_words_reach_the_decoder(llm: LLM) -> None:
    free = tokens(llm)
    told = one(llm.generate(PROMPT, SamplingParams(max_tokens=1, return_generation_logits=True))).outputs[0]
    assert told.generation_logits is not None
    bias = torch.zeros(told.generation_logits.shape[1])
    bias[77] = 1000.0
    assert tokens(llm, embedding_bias=bias) == [77] * 12
    assert tokens(llm, embedding_bias=bias.tolist(), frequency_penalty=2.0) == [77] * 12
    assert free[0] not in tokens(llm, bad_token_ids=[free[0]])
    assert tokens(llm, bad_token_ids=[free[:2]])[:2] != free[:2]
    assert len(set(tokens(llm, no_repeat_ngram_size=1))) == 12
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert tokens(llm, max_tokens=40, **{field: 2.0}) != tokens(llm, max_tokens=40), field
    decayed = tokens(llm, temperature=2.0, seed=2, top_p=0.9, top_p_decay=0.01, top_p_min=0.001, top_p_reset_ids=3)
    assert decayed != tokens(llm, temperature=2.0, seed=2, top_p=0.9)


def test_bad_strings_never_come(llm: LLM) -> None:
    free = one(llm.generate(PROMPT, FREE)).outputs[0]
    word = llm.tokenizer.decode([free.token_ids[3]])
    assert free.token_ids[3] not in tokens(llm, bad=word)
    assert free.token_ids[3] not in tokens(llm, bad=[word, "never said"])


def test_logits_processors_edit_one_request(llm: LLM) -> None:
    seen: list[tuple[Any, ...]] = []

    def force(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        seen.append((tuple(logits.shape), list(token_ids[0])))
        logits[..., 50 + len(token_ids[0])] += 1000.0

    def spare(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        logits[..., 62] = float("-inf")

    alone = tokens(llm)
    forced = tokens(llm, logits_processor=force, max_tokens=3)
    assert forced == [60, 61, 62]
    assert seen[1][0][:2] == (1, 1)
    assert [ids for _, ids in seen] == [PROMPT, [*PROMPT, 60], [*PROMPT, 60, 61]]
    assert tokens(llm, logits_processor=[force, spare], max_tokens=3)[:2] == [60, 61]
    assert 62 not in tokens(llm, logits_processor=[force, spare], max_tokens=3)
    assert tokens(llm) == alone


def test_a_processor_that_fails_ends_its_own_request(llm: LLM) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("no such grammar")

    other = llm.generate_async(PROMPT, SamplingParams(max_tokens=300, ignore_eos=True))
    with pytest.raises(ValueError, match="no such grammar"):
        llm.generate(PROMPT, SamplingParams(logits_processor=fail))
    assert other.result(60).outputs[0].length == 300


def test_the_batched_processor_edits_those_that_ask(llm: LLM, directory: Path) -> None:
    calls = BAN_EVEN.num_calls
    asking = SamplingParams(max_tokens=8, ignore_eos=True, apply_batched_logits_processor=True)
    free, banned = llm.generate([PROMPT, PROMPT], [FREE, asking], use_tqdm=False)  # type: ignore[misc]
    assert all(token % 2 for token in banned.outputs[0].token_ids)
    assert free.outputs[0].token_ids == tokens(llm)
    assert BAN_EVEN.num_calls == calls + 8


def test_salt_separates_what_is_cached(llm: LLM) -> None:
    prompt = [3 + n % 80 for n in range(100)]
    params = SamplingParams(max_tokens=1)
    cached = [one(llm.generate(prompt, params, cache_salt=salt)).cached_tokens for salt in ("a", "b", "a", None)]
    assert cached[0] == cached[1] == cached[3] == 0
    assert cached[2] >= 96
    both = llm.generate([prompt, prompt], params, cache_salt=["b", "c"], use_tqdm=False)
    assert [output.cached_tokens >= 96 for output in both] == [True, False]  # type: ignore[union-attr]


def test_retention_reaches_the_cache_and_its_events(llm: LLM) -> None:
    llm.get_kv_cache_events()
    prompt = [4 + n % 70 for n in range(96)]
    config = KvCacheRetentionConfig([TokenRangeRetentionConfig(0, 32, 90), TokenRangeRetentionConfig(32, None, 10)], 5)
    llm.generate(prompt, SamplingParams(max_tokens=2), kv_cache_retention_config=config)

    async def gather() -> list[dict[str, Any]]:
        return [event async for event in llm.get_kv_cache_events_async()]

    events = asyncio.run(gather())
    stored = [event["data"] for event in events if event["data"]["type"] == "stored"]
    blocks = [block for data in stored for block in data["blocks"]]
    assert [token["token_id"] for block in blocks for token in block["tokens"]][:64] == prompt[:64]
    assert [block["priority"] for block in blocks][:2] == [90, 10]
    assert [event["event_id"] for event in events] == sorted(event["event_id"] for event in events)
    assert llm.get_kv_cache_events() == []


def test_retention_in_protocol_form() -> None:
    assert KvCacheRetentionConfig.TokenRangeRetentionConfig is TokenRangeRetentionConfig  # type: ignore[attr-defined]
    config = KvCacheRetentionConfig([TokenRangeRetentionConfig(8, 9, 100, timedelta(seconds=3))], 0, 250)
    assert retention_of(config) == Retention((RetentionRange(8, 9, 100, 3.0),), 0, 0.25)
    for wrong in (
        {"token_start": -1},
        {"token_start": 4, "token_end": 4},
        {"token_start": 0, "priority": 101},
        {"token_start": 0, "duration_ms": 0},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            TokenRangeRetentionConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decode_retention_priority"):
        KvCacheRetentionConfig(decode_retention_priority=101)


def hurried(llm: LLM, timeouts_s: tuple[float, ...] = (1.0, 8.0, 32.0)) -> CompletionOutput:
    """An answer whose deadline passes in its midst. On a machine that stands still until before its first token, a
    later deadline does."""
    endless = SamplingParams(max_tokens=4000, ignore_eos=True, logits_processor=lambda *given: time.sleep(0.02))
    options = SchedulingParams(timeout_s=timeouts_s[0], priority=3)
    try:
        return one(llm.generate(PROMPT, endless, scheduling_params=options)).outputs[0]
    except DeadlineExceeded:
        return hurried(llm, timeouts_s[1:])


def test_a_deadline_ends_with_what_there_is(llm: LLM) -> None:
    output = hurried(llm)
    assert output.finish_reason == "timeout"
    assert 0 < output.length < 4000
    for wrong in ({"timeout_s": 0}, {"priority": "high"}, {"attention_dp_rank": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SchedulingParams(**wrong)  # type: ignore[arg-type]


def test_preprocessing_apart_from_generating(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, truncate_prompt_tokens=3)
    whole = one(llm.generate("The capital of France", params))
    ready = llm.preprocess("The capital of France", params)
    assert (ready.prompt, len(ready.prompt_token_ids)) == ("The capital of France", 3)
    for output in (llm.generate_async(ready), llm.generate_async(ready, params)):
        assert output.result(60).outputs[0].token_ids == whole.outputs[0].token_ids
    longer = llm.generate_async(ready, SamplingParams(max_tokens=9, ignore_eos=True)).result(60)
    assert (longer.prompt_token_ids, longer.outputs[0].length) == (whole.prompt_token_ids, 9)
    with pytest.raises(ValueError, match="top_p"):
        llm.preprocess("x", SamplingParams(top_p=3))


def test_statistics_in_an_event_loop(llm: LLM) -> None:
    tokens(llm, max_tokens=1)  # behind it, no step is for a request that was aborted before
    llm.get_stats()
    tokens(llm, max_tokens=4)

    async def gather() -> list[int]:
        return [row["iter"] async for row in llm.get_stats_async(timeout=2.0)]

    numbers = asyncio.run(gather())
    assert numbers == list(range(numbers[0], numbers[0] + 4))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 10**6}, "n is 1000000"),
        ({"n": True}, "n is True"),
        ({"n": 3, "best_of": 2}, "best_of is 2"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 1.0}, "length_penalty"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"beam_width_array": [2]}, "beam_width_array"),
        ({"beam_search_diversity_rate": 0.5}, "beam_search_diversity_rate"),
        ({"guided_decoding": {"json": "{}"}}, "guided_decoding is a dict"),
        ({"guided_decoding": GuidedDecodingParams(json="{}", regex="a")}, "json and regex"),
        ({"guided_decoding": GuidedDecodingParams(json={"uniqueItems": True})}, "guided_decoding.json.*uniqueItems"),
        ({"guided_decoding": GuidedDecodingParams(json=7)}, "guided_decoding.json is a int"),
        ({"guided_decoding": GuidedDecodingParams(regex=7)}, "guided_decoding.regex is a int"),
        ({"guided_decoding": GuidedDecodingParams(choice=[])}, "guided_decoding.choice"),
        ({"lookahead_config": object()}, "lookahead_config"),
        ({"return_encoder_output": True}, "return_encoder_output"),
        ({"additional_model_outputs": ["hidden_states"]}, "additional_model_outputs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"prompt_logprobs": "all"}, "prompt_logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": 9}, "frequency_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"bad": [""]}, "bad"),
        ({"bad": 5}, "bad"),
        ({"bad_token_ids": 5}, "bad_token_ids"),
        ({"bad_token_ids": [10**6]}, "bad_token_ids"),
        ({"embedding_bias": torch.zeros(3)}, "embedding_bias"),
        ({"embedding_bias": torch.zeros(2, 2)}, "embedding_bias"),
        ({"embedding_bias": "x"}, "embedding_bias"),
        ({"top_p_decay": 2.0, "top_p": 0.5}, "top_p_decay"),
        ({"top_p_reset_ids": 10**6}, "top_p_reset_ids"),
        ({"logits_processor": "mask"}, "logits_processor"),
        ({"logits_processor": [5]}, "logits_processor"),
        ({"pad_id": -1}, "pad_id"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"stop": object()}, "stop"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"max_tokens": "12"}, "max_tokens"),
    ],
)
def test_a_wrong_field_is_a_value_error_that_names_it(llm: LLM, fields: dict[str, Any], words: str) -> None:
    running = set(llm._running)
    with pytest.raises(ValueError, match=words):
        llm.generate([[5], PROMPT], [FREE, SamplingParams(**fields)])
    assert set(llm._running) <= running, "a list with one wrong prompt starts nothing"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"cache_salt": ["a", "b"]}, "cache_salt"),
        ({"kv_cache_retention_config": {"priority": 3}}, "kv_cache_retention_config"),
        ({"scheduling_params": [SchedulingParams(), SchedulingParams()]}, "scheduling_params"),
        ({"disaggregated_params": "context_only"}, "disaggregated_params"),
        ({"lora_request": LoRARequest("name", 1)}, "lora_request needs an LLM that was made with enable_lora"),
        ({"sampling_params": "greedy"}, "sampling_params"),
        ({"sampling_params": [None]}, "sampling_params"),
        ({"inputs": b"bytes"}, "inputs must be"),
        ({"inputs": {"prompt": 5}}, "'prompt' is a int"),
        ({"inputs": {"prompt": "a", "image": 5}}, "image"),
        ({"inputs": "\ud800"}, "prompt"),
        ({"inputs": None}, "inputs must be"),
    ],
)
def test_a_wrong_option_is_a_value_error_that_names_it(llm: LLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate(**{"inputs": "x", **options})
    assert len(tokens(llm, max_tokens=2)) == 2


def test_prompt_adapters_are_deprecated_and_refused(llm: LLM) -> None:
    with pytest.warns(DeprecationWarning, match="prompt_adapter_request"), pytest.raises(ValueError, match="inputs"):
        llm.generate_async("x", prompt_adapter_request=PromptAdapterRequest("name", 1))
