"""The LLM class with one rank, a small random model and a small real tokenizer."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, SamplingParams
from tests.llmapi.small_llm import CACHE, one
from tests.workers.tiny_models import their_greedy


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as made:
        yield made


def test_single_and_batched_prompts_keep_their_shape_and_order(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    text = "The capital of France"
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    single = one(llm.generate(text, params))
    assert (single.prompt, single.prompt_token_ids, single.finished) == (text, ids, True)
    assert single.outputs[0].length == 9
    assert single.outputs[0].finish_reason == "length"
    batch = llm.generate([text, ids, {"prompt": text}, {"prompt_token_ids": ids}, [5, 6]], params, use_tqdm=False)
    assert isinstance(batch, list)
    assert [out.outputs[0].token_ids for out in batch[:4]] == [single.outputs[0].token_ids] * 4
    assert batch[4].prompt is None
    assert [out.prompt_token_ids for out in batch[:4]] == [ids] * 4


def test_greedy_equals_transformers(llm: LLM, directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    prompts = [[7], [9, 8, 7] * 20, list(range(3, 150))]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True), use_tqdm=False)
    assert isinstance(outputs, list)
    assert [out.outputs[0].token_ids for out in outputs] == their_greedy(theirs, prompts, 16)


def test_streaming_diffs_add_up(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.2, seed=5, ignore_eos=True)
    whole = one(llm.generate("France", params)).outputs[0]
    text, ids, num_iterations = "", [], 0
    has_come, num_prompt = threading.Event(), len(llm.tokenizer.encode("France", add_special_tokens=False))

    def hold_the_second(req_id: int, logits: Any, token_ids: list[list[int]], *others: Any) -> None:
        """What comes while nobody looks is told as one."""
        assert len(token_ids[0]) == num_prompt or has_come.wait(60)

    future = llm.generate_async("France", replace(params, logits_processor=hold_the_second), streaming=True)
    for partial in future:
        has_come.set()
        assert partial is future
        text += partial.outputs[0].text_diff
        ids += partial.outputs[0].token_ids_diff
        num_iterations += 1
    assert (text, ids) == (whole.text, whole.token_ids)
    assert num_iterations > 1
    assert future.finished


def test_a_result_can_be_waited_for_awaited_and_iterated(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = one(llm.generate("Paris", params)).outputs[0].token_ids

    async def in_a_loop() -> list[list[int]]:
        awaited = await llm.generate_async("Paris", params)
        streamed = [out.outputs[0].token_ids[:] async for out in llm.generate_async("Paris", params, streaming=True)]
        many = await asyncio.gather(*(llm.generate_async("Paris", params).aresult() for _ in range(5)))
        return [awaited.outputs[0].token_ids, streamed[-1], *(out.outputs[0].token_ids for out in many)]

    assert asyncio.run(in_a_loop()) == [expected] * 7
    assert llm.generate_async("Paris", params).result(60).outputs[0].token_ids == expected
    finished = list(llm.generate_async("Paris", params))
    assert [out.outputs[0].token_ids for out in finished] == [expected]


def endless() -> SamplingParams:
    """More than a minute's work, on the fastest machine too."""
    return SamplingParams(max_tokens=3000, ignore_eos=True, logits_processor=lambda *given: time.sleep(0.03))


def test_timeout_leaves_the_request_running_and_abort_ends_it(llm: LLM) -> None:
    future = llm.generate_async("France", endless())
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    future.abort()
    output = future.result(60).outputs[0]
    assert output.finish_reason == "cancelled"
    assert future.aborted()
    assert output.length < 3000


def test_seeds_repeat_and_their_absence_does_not(llm: LLM) -> None:
    seeded = SamplingParams(max_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    alone = one(llm.generate("Seine", seeded)).outputs[0].token_ids
    crowd = llm.generate(["Seine", *["x" * i for i in range(1, 12)]], seeded, use_tqdm=False)
    assert isinstance(crowd, list)
    assert crowd[0].outputs[0].token_ids == alone
    free = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    runs = {tuple(one(llm.generate("Seine", free)).outputs[0].token_ids) for _ in range(4)}
    assert len(runs) > 1


def test_stop_strings_ids_and_end_id(llm: LLM) -> None:
    free = one(llm.generate("France", SamplingParams(max_tokens=30, ignore_eos=True))).outputs[0]
    stop = free.text[3:6]
    assert stop
    cut = one(llm.generate("France", SamplingParams(max_tokens=30, ignore_eos=True, stop=stop))).outputs[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = SamplingParams(max_tokens=30, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    assert one(llm.generate("France", kept)).outputs[0].text == free.text[: free.text.index(stop) + len(stop)]
    token = free.token_ids[4]
    first = free.token_ids.index(token)
    by_id = one(llm.generate("France", SamplingParams(max_tokens=30, stop_token_ids=[token]))).outputs[0]
    assert (by_id.token_ids, by_id.stop_reason) == (free.token_ids[: first + 1], token)
    by_end = one(llm.generate("France", SamplingParams(max_tokens=30, end_id=token))).outputs[0]
    assert (by_end.token_ids, by_end.finish_reason, by_end.stop_reason) == (by_id.token_ids, "stop", None)


def test_prompt_truncation_and_no_detokenizing(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, truncate_prompt_tokens=3, detokenize=False, ignore_eos=True)
    output = one(llm.generate([9, 8, 7, 6, 5], params))
    assert output.prompt_token_ids == [7, 6, 5]
    assert output.outputs[0].text == ""
    assert output.outputs[0].length == 4


@pytest.mark.parametrize(
    ("inputs", "params", "words"),
    [
        ("", {}, "no tokens"),
        ([[]], {}, "no tokens"),
        ([1, 10**6], {}, "outside"),
        ([-1], {}, "outside"),
        ({"promt": "x"}, {}, "promt"),
        ({}, {}, "needs"),
        ([[1], [2, "x"]], {}, "integers"),
        (7, {}, "must be"),
        ([1] * 5000, {}, "context"),
        ([1] * 4090, {"max_tokens": 10}, "max_tokens"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"temperature": -1}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 2}, "top_p"),
        ([1], {"top_k": -2}, "top_k"),
        ([1], {"min_p": 1.5}, "min_p"),
        ([1], {"stop": [3]}, "stop"),
        ([1], {"stop": ""}, "stop"),
        ([1], {"stop_token_ids": [10**6]}, "stop_token_ids"),
        ([1], {"end_id": 10**6}, "end_id"),
        ([1], {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ([1], {"seed": "x"}, "seed"),
    ],
)
def test_mistakes_are_value_errors_that_name_them(llm: LLM, inputs: Any, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate(inputs, SamplingParams(**params))
    assert one(llm.generate([3, 4], SamplingParams(max_tokens=2, ignore_eos=True))).outputs[0].length == 2


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 1"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()])
    outputs = llm.generate(["a", "b"], [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=5)])
    assert isinstance(outputs, list)
    assert outputs[0].outputs[0].length == 2


def test_threads_share_one_llm(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = one(llm.generate("a b c", params)).outputs[0].token_ids
    got: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: got.append(one(llm.generate("a b c", params)).outputs[0].token_ids))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [expected] * 8


def test_statistics_and_identity(llm: LLM) -> None:
    llm.generate("a", SamplingParams(max_tokens=1))  # behind it, no step is for a request that was aborted before
    llm.get_stats()
    llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
    rows = llm.get_stats(timeout=2.0)
    assert len(rows) == 3
    assert {"iter", "gpuMemUsage", "kvCacheStats", "inflightBatchingStats"} <= rows[0].keys()
    assert llm.llm_id.startswith("llm-")
    with pytest.raises(RuntimeError, match="pickled"):
        pickle.dumps(llm)


def test_wrong_arguments_are_refused_by_name(directory: Path, tmp_path: Path) -> None:
    for arguments, words in [
        ({"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"dtype": "float8"}, "dtype"),
        ({"backend": "tensorrt"}, "use backend='pytorch'"),
        ({"kv_cache_config": {"tokens_per_block": 33}}, "power of two"),
        ({"kv_cache_config": {"token_per_block": 32}}, "did you mean 'tokens_per_block'"),
    ]:
        with pytest.raises(ValueError, match=words):
            LLM(directory, **arguments)
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        LLM(directory, tokenizer=tmp_path)


def test_without_a_tokenizer(directory: Path) -> None:
    with LLM(directory, skip_tokenizer_init=True, dtype="float32", kv_cache_config=CACHE) as llm:
        assert llm.tokenizer is None
        output = one(llm.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))).outputs[0]
        assert (output.length, output.text) == (4, "")
        with pytest.raises(ValueError, match="tokenizer"):
            llm.generate("text")
        with pytest.raises(ValueError, match="stop strings"):
            llm.generate([5], SamplingParams(stop="x"))


def test_shutdown_ends_what_runs_and_refuses_more(directory: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(directory, dtype="float32", kv_cache_config=CACHE)
    own = set(threading.enumerate()) - before
    future = llm.generate_async("France", endless())
    llm.shutdown()
    llm.shutdown()
    assert future.result(60).outputs[0].finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("more")
    assert len(own) >= 2
    assert not any(thread.is_alive() for thread in own)
