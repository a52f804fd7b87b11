"""The examples of the LLM class's reference, unchanged, with our own model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import tensorweave
from tensorweave import LLM
from tensorweave.sampling_params import SamplingParams
from tests.llmapi.small_llm import CACHE, write_small_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(
        model=str(directory), tokenizer=str(directory), tensor_parallel_size=1, dtype="float32", kv_cache_config=CACHE
    ) as made:
        yield made


def test_both_import_paths_give_the_same_class() -> None:
    assert tensorweave.SamplingParams is SamplingParams


def test_one_prompt_and_several(llm: LLM) -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=10, seed=1)
    output = llm.generate("What is machine learning?", sampling_params=params)
    assert output.outputs[0].length == 10  # type: ignore[union-attr]
    prompts = ["Tell me about Python", "What is TensorRT?", "Explain neural networks"]
    outputs = llm.generate(prompts, sampling_params=SamplingParams(max_tokens=4))
    assert [output.prompt for output in outputs] == prompts  # type: ignore[union-attr]
    as_ids = llm.generate(inputs=[1, 2, 3, 4], sampling_params=SamplingParams(max_tokens=4))
    assert as_ids.prompt_token_ids == [1, 2, 3, 4]  # type: ignore[union-attr]


def test_a_stream_adds_up(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    future = llm.generate_async("Write a short transcript", sampling_params=params, streaming=True)
    text = "".join(partial.outputs[0].text_diff for partial in future)
    assert text == llm.generate("Write a short transcript", params).outputs[0].text  # type: ignore[union-attr]


def test_preprocessing_first(llm: LLM) -> None:
    preprocessed = llm.preprocess(inputs="Tell me about AI", sampling_params=SamplingParams(max_tokens=7))
    assert llm.generate_async(inputs=preprocessed).result().outputs[0].length == 7


def test_statistics(llm: LLM) -> None:
    llm.generate("x", SamplingParams(max_tokens=3))
    for stat in llm.get_stats(timeout=2.0):
        assert f"Iteration {stat['iter']}: {stat['gpuMemUsage']} MB GPU memory"
    llm.generate("x", SamplingParams(max_tokens=3))

    async def gather() -> list[str]:
        return [f"GPU memory: {stat['gpuMemUsage']} MB" async for stat in llm.get_stats_async(timeout=2.0)]

    assert asyncio.run(gather())


def test_a_saved_engine_and_the_context_manager(llm: LLM, tmp_path: Path) -> None:
    llm.save(str(tmp_path / "saved_engine"))
    with LLM(model=str(tmp_path / "saved_engine"), backend="pytorch", dtype="float32", kv_cache_config=CACHE) as again:
        params = SamplingParams(max_tokens=5)
        outputs = [one.generate("Hello, world!", params).outputs[0] for one in (llm, again)]  # type: ignore[union-attr]
    assert outputs[0].token_ids == outputs[1].token_ids


def test_what_an_output_says_of_its_steps(llm: LLM) -> None:
    for is_excluded in (True, False):
        params = SamplingParams(max_tokens=5, ignore_eos=True, exclude_input_from_output=is_excluded)
        output = llm.generate_async("Hello", params)
        assert (output.decoding_iter, output.avg_decoded_tokens_per_iter) == (0, None)
        output.result(60)
        assert (output.decoding_iter, output.avg_decoded_tokens_per_iter) == (5, 1.0)
        assert output.disaggregated_params is None
        assert output.outputs[0].additional_generation_outputs is None


def test_an_end_that_was_asked_for_is_the_stop_reason(llm: LLM) -> None:
    free = llm.generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0]  # type: ignore[union-attr]
    end = free.token_ids[3]
    for is_ignored, reason in ((False, None), (True, end)):
        params = SamplingParams(max_tokens=9, end_id=end, stop_token_ids=[end], ignore_eos=is_ignored)
        output = llm.generate("Hello", params).outputs[0]  # type: ignore[union-attr]
        assert (output.finish_reason, output.stop_reason) == ("stop", reason)
