"""The LLM class's inputs and outputs can be pickled (as a Ray actor returns it), copied and compared."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorweave
from tensorweave import (
    LLM,
    CacheTransceiverConfig,
    CompletionOutput,
    CudaGraphConfig,
    DisaggregatedParams,
    GuidedDecodingParams,
    KvCacheConfig,
    KvCacheRetentionConfig,
    LlmArgs,
    Logprob,
    LoraConfig,
    LoRARequest,
    MoeConfig,
    NGramDecodingConfig,
    PreprocessedInputs,
    PromptAdapterRequest,
    QuantAlgo,
    QuantConfig,
    RequestOutput,
    SamplingParams,
    SchedulerConfig,
    SchedulingParams,
    TokenRangeRetentionConfig,
    UserProvidedDecodingConfig,
)
from tensorweave.cluster.errors import Overloaded, WorkerLost, error_from_wire
from tensorweave.llmapi.completion_output import Update
from tests.llmapi.small_llm import one

PATIENCE_S = 60.0
Copier = Callable[[Any], Any]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


both = pytest.mark.parametrize("copier", [pickled, copy.deepcopy])


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    config = KvCacheConfig(max_tokens=8192, event_buffer_max_size=1000)
    transceiver = CacheTransceiverConfig(backend="DEFAULT")
    with LLM(directory, dtype="float32", kv_cache_config=config, cache_transceiver_config=transceiver) as made:
        yield made


@both
def test_a_finished_output_keeps_its_values(llm: LLM, copier: Copier) -> None:
    params = SamplingParams(
        max_tokens=5,
        n=2,
        best_of=3,
        temperature=1.0,
        logprobs=1,
        prompt_logprobs=1,
        return_context_logits=True,
        return_generation_logits=True,
        return_perf_metrics=True,
        ignore_eos=True,
    )
    output = one(llm.generate("The sea", params))
    again = copier(output)
    assert again == output
    assert hash(again) == hash(output)
    assert again is not output
    assert again.finished
    assert again.result() is again
    assert asyncio.run(again.aresult()) is again
    assert (again.request_id, again.prompt, again.prompt_token_ids) == (
        output.request_id,
        "The sea",
        output.prompt_token_ids,
    )
    for ours, theirs in zip(again.outputs, output.outputs, strict=True):
        assert ours == theirs
        assert (ours.text, ours.token_ids, ours.finish_reason) == (theirs.text, theirs.token_ids, theirs.finish_reason)
        assert (ours.logprobs, ours.prompt_logprobs) == (theirs.logprobs, theirs.prompt_logprobs)
        assert torch.equal(ours.generation_logits, theirs.generation_logits)
        assert (ours.text_diff, ours.request_perf_metrics) == (theirs.text_diff, theirs.request_perf_metrics)
    assert torch.equal(again.context_logits, output.context_logits)
    again.outputs[0].token_ids.append(1)
    assert again != output
    assert output != one(llm.generate("The sea", params)), "another request"
    assert output != "The sea"


@both
def test_a_copy_of_an_unfinished_output_says_so(llm: LLM, copier: Copier) -> None:
    slow = SamplingParams(max_tokens=3000, ignore_eos=True, logits_processor=lambda *given: time.sleep(0.03))
    output = llm.generate_async([9, 8, 7], slow, streaming=True)
    iterator = iter(output)
    next(iterator)
    snapshot = copier(output)
    output.abort()
    assert not snapshot.finished
    assert snapshot.outputs[0].finish_reason is None
    assert snapshot.outputs[0].token_ids
    with pytest.raises(RuntimeError, match=f"copy of request {output.request_id}, made before that was finished"):
        snapshot.result()
    with pytest.raises(RuntimeError, match="copy"):
        asyncio.run(snapshot.aresult())
    with pytest.raises(RuntimeError, match="copy"):
        list(snapshot)
    snapshot.abort()
    assert not copier(snapshot).finished
    assert output.result(PATIENCE_S).outputs[0].finish_reason == "cancelled"
    assert copier(output) == output


def test_a_copy_has_what_nobody_had_looked_at_yet() -> None:
    output = RequestOutput(3, None, [1])
    output._push(Update(token_ids=[4], text="a"))
    begun = pickled(output)
    output._push(Update(token_ids=[5], text="b", finish_reason="stop"))
    ended = pickled(output)
    assert [each.outputs[0].text_diff for each in ended] == ["a", "b"]
    assert output.result(0).outputs[0].text == "ab" == pickled(output).outputs[0].text
    iterator = iter(begun)
    assert next(iterator).outputs[0].text == "a"
    with pytest.raises(RuntimeError, match="copy"):
        next(iterator)


@both
def test_an_output_that_failed_fails_alike(copier: Copier) -> None:
    output = RequestOutput(3, None, [1])
    output._push(Update(error=Overloaded("full", retry_after_s=2.0)))
    again = copier(output)
    for each in (output, again, copier(again)):
        with pytest.raises(Overloaded, match="full") as caught:
            each.result(0)
        assert caught.value.retry_after_s == 2.0
    assert pickled(output) == output


@both
def test_each_phase_and_each_statistic_can_be_copied(llm: LLM, copier: Copier) -> None:
    ready = llm.preprocess("The sea", SamplingParams(max_tokens=4), DisaggregatedParams(request_type="context_only"))
    assert copier(ready) == ready
    [first] = llm.generate([copier(ready)], use_tqdm=False)  # type: ignore[list-item, misc]
    phase = first.disaggregated_params
    assert phase is not None, "a preprocessed prompt's own parameters count"
    assert copier(first) == first
    assert copier(phase) == phase
    for told in (llm.get_stats(), llm.get_kv_cache_events(), llm.disaggregated_params):
        assert copier(told) == told
    llm.generate("more", SamplingParams(max_tokens=3))

    async def read() -> None:
        stats = llm.get_stats_async()
        assert [row async for row in copier(stats)] == [], "nothing had been fetched"
        await anext(stats)
        fetched = [row async for row in copier(stats)]
        assert len(fetched) >= 2
        assert [row async for row in stats][: len(fetched)] == fetched

    asyncio.run(read())


def greedy(*given: Any) -> None:
    """A logits processor that can be found by name."""


EXAMPLES = [
    SamplingParams(temperature=0.5, stop=["a"], logits_processor=greedy, bad_token_ids=[[1, 2]]),
    SamplingParams(embedding_bias=torch.ones(4)),
    Logprob(-0.5, 1),
    CompletionOutput(1, "a", [5], logprobs=[{5: Logprob(-0.5, 1)}]),
    DisaggregatedParams(request_type="generation_only", first_gen_tokens=[1], opaque_state=b"x"),
    PreprocessedInputs("a", [1], SamplingParams(seed=3)),
    KvCacheRetentionConfig([TokenRangeRetentionConfig(0, 32, 90, timedelta(seconds=3))], 5, 250),
    TokenRangeRetentionConfig(0),
    SchedulingParams(priority=3, timeout_s=2.0),
    LoRARequest("name", 1),
    PromptAdapterRequest("name", 1),
    KvCacheConfig(max_tokens=64),
    LoraConfig(max_lora_rank=8),
    SchedulerConfig(),
    CacheTransceiverConfig(backend="DEFAULT"),
    CudaGraphConfig(batch_sizes=[1, 8]),
    MoeConfig(),
    QuantConfig(quant_algo=QuantAlgo.FP8),
    QuantAlgo.FP8,
    GuidedDecodingParams(json={"type": "object"}),
    NGramDecodingConfig(max_draft_len=4),
    UserProvidedDecodingConfig(max_draft_len=4, drafter="package.module:Drafter"),
    LlmArgs(model="m", tensor_parallel_size=2, kv_cache_config=KvCacheConfig(max_tokens=64)),
]


@both
@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_public_value_equals_its_copy(value: Any, copier: Copier) -> None:
    again = copier(value)
    assert again == value
    assert type(again) is type(value)
    assert repr(again) == repr(value)


def test_no_public_value_is_left_out() -> None:
    tried = {type(value).__name__ for value in EXAMPLES} | {"RequestOutput", "IterationResult", "LLM", "__version__"}
    assert set(tensorweave.__all__) - tried == {"LlmArgs"} - tried
    assert SamplingParams(embedding_bias=torch.ones(4)) != SamplingParams(embedding_bias=torch.zeros(4))
    assert SamplingParams(embedding_bias=torch.ones(4)) != SamplingParams()
    assert SamplingParams() != 5


@both
def test_errors_keep_their_fields(copier: Copier) -> None:
    error = WorkerLost("gone", param="x", retry_after_s=1.5)
    again = copier(error)
    assert (type(again), again.to_wire()) == (WorkerLost, error.to_wire())
    assert error_from_wire(again.to_wire()).message == "gone"


@both
def test_an_llm_is_not_copied(llm: LLM, copier: Copier) -> None:
    with pytest.raises(RuntimeError, match="create it where it runs"):
        copier(llm)
