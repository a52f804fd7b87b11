"""Inputs of `generate`: each is accepted, or refused by a ValueError that says what to do."""

from __future__ import annotations

from collections import UserList, deque
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
import pytest
import torch

from tensorweave import LLM, PreprocessedInputs, SamplingParams
from tests.llmapi.small_llm import CACHE, one

PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)
IDS = [9, 8, 7]


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as made:
        yield made


@pytest.mark.parametrize("inputs", [[], (), deque(), UserList()])
@pytest.mark.parametrize("params", [None, PARAMS, []])
def test_no_prompts_have_no_outputs(llm: LLM, inputs: Any, params: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert llm.generate(inputs, params) == []
    assert llm.generate(inputs, params, cache_salt=[], scheduling_params=[], disaggregated_params=[]) == []
    assert capfd.readouterr().err == "", "no progress bar of nothing"


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        deque(IDS),
        UserList(IDS),
        range(9, 6, -1),
        [numpy.int64(9), numpy.int32(8), numpy.uint8(7)],
        list(numpy.array(IDS)),
        {"prompt_token_ids": numpy.array(IDS).tolist()},
        {"prompt_token_ids": tuple(map(numpy.int64, IDS))},
        {"prompt_token_ids": IDS, "prompt": None},
        MappingProxyType({"prompt_token_ids": IDS}),
        PreprocessedInputs(None, IDS),
        PreprocessedInputs(None, list(numpy.array(IDS))),
    ],
)
def test_token_ids_come_in_many_forms(llm: LLM, prompt: Any) -> None:
    expected = one(llm.generate(IDS, PARAMS)).outputs[0].token_ids
    single = one(llm.generate(prompt, PARAMS))
    assert single.prompt_token_ids == IDS
    assert {type(token) for token in single.prompt_token_ids} == {int}
    [first, second] = llm.generate((prompt, "France"), (PARAMS, PARAMS), use_tqdm=False)  # type: ignore[arg-type, misc]
    asked = llm.generate_async(prompt, PARAMS).result(60)
    assert [output.outputs[0].token_ids for output in (single, first, asked)] == [expected] * 3
    assert second.prompt == "France"


def test_a_dict_tells_its_text_too(llm: LLM) -> None:
    both = one(llm.generate({"prompt": "told", "prompt_token_ids": IDS}, PARAMS))
    assert (both.prompt, both.prompt_token_ids) == ("told", IDS)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("", "prompt has no tokens"),
        ([[]], "prompt has no tokens"),
        ({"prompt": ""}, "prompt has no tokens"),
        ({"prompt_token_ids": []}, "prompt has no tokens"),
        ({"prompt_token_ids": ()}, "prompt has no tokens"),
        (["a", ""], "prompt has no tokens"),
        ({}, "needs 'prompt' or 'prompt_token_ids'"),
        ({"prompt": None}, "needs 'prompt' or 'prompt_token_ids'"),
        ((text for text in ("a", "b")), "not generator: make a list of it"),
        ({"a", "b"}, "not set: make a list of it"),
        (iter(IDS), "make a list of it"),
        (numpy.array(IDS), r"not ndarray: pass its tolist\(\)"),
        (torch.tensor(IDS), r"not Tensor: pass its tolist\(\)"),
        ([numpy.array(IDS)], r"not ndarray: pass its tolist\(\)"),
        ({"prompt_token_ids": torch.tensor(IDS)}, r"not Tensor: pass its tolist\(\)"),
        ({"prompt_token_ids": iter(IDS)}, "make a list of it"),
        ([5, "a"], "holds numbers, as token ids of one prompt, beside a str"),
        ([[5], 6], "beside a list"),
        ([5, 6.0], "beside a float"),
        ([5, None], "beside a NoneType"),
        ([True, False], "True is not"),
        ([[5, 6.0]], "6.0 is not"),
        ([["a", "b"]], "'a' is not"),
        ([None], "not NoneType"),
        ([-1, 5], "token id -1"),
        ([10**9], "token id 1000000000"),
        (5, "not int"),
        (bytearray(b"abc"), "not bytearray"),
        ([bytearray(b"abc")], "not bytearray"),
    ],
)
def test_other_inputs_are_refused_with_advice(llm: LLM, inputs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate(inputs, PARAMS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sampling_params": []}, "0 sampling_params for 2 prompts"),
        ({"sampling_params": [PARAMS]}, "1 sampling_params for 2 prompts"),
        ({"sampling_params": [PARAMS] * 3}, "3 sampling_params for 2 prompts"),
        ({"sampling_params": [PARAMS, None]}, "sampling_params is a NoneType"),
        ({"sampling_params": (PARAMS for _ in range(2))}, "sampling_params is a generator"),
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params is a dict"),
        ({"cache_salt": ["a"]}, "1 of cache_salt for 2 prompts"),
        ({"cache_salt": []}, "0 of cache_salt for 2 prompts"),
        ({"scheduling_params": []}, "0 of scheduling_params for 2 prompts"),
        ({"kv_cache_retention_config": iter([])}, "kv_cache_retention_config"),
        ({"disaggregated_params": []}, "0 disaggregated_params for 2 prompts"),
    ],
)
def test_lists_that_do_not_fit_the_prompts_are_refused(llm: LLM, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate(["a", "b"], **given)


def test_one_prompt_at_a_time_without_waiting(llm: LLM) -> None:
    for inputs in (["a", "b"], [["a"]], [[5], [6]]):
        with pytest.raises(ValueError, match="token ids must be integers"):
            llm.generate_async(inputs)
    with pytest.raises(ValueError, match="no tokens"):
        llm.generate_async([])


def test_numpy_numbers_are_numbers_in_sampling_params_too(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=3, temperature=0.5, seed=7, n=2, stop_token_ids=[5], bad_token_ids=[[6, 7], 8])
    theirs = SamplingParams(
        max_tokens=numpy.int64(3),  # type: ignore[arg-type]
        temperature=numpy.float32(0.5),  # type: ignore[arg-type]
        seed=numpy.uint8(7),  # type: ignore[arg-type]
        n=numpy.int32(2),  # type: ignore[arg-type]
        stop_token_ids=list(numpy.array([5])),
        bad_token_ids=[list(numpy.array([6, 7])), numpy.int64(8)],  # type: ignore[list-item]
    )
    for prompt in (IDS, llm.preprocess(IDS, theirs)):
        told = [[each.token_ids for each in one(llm.generate(prompt, each)).outputs] for each in (plain, theirs)]
        assert told[0] == told[1]
    with pytest.raises(ValueError, match="max_tokens"):
        llm.generate(IDS, SamplingParams(max_tokens=numpy.float64(3.5)))  # type: ignore[arg-type]


def test_what_preprocess_was_given_counts_in_a_list_too(llm: LLM) -> None:
    ready: list[Any] = [llm.preprocess(IDS, SamplingParams(max_tokens=n, ignore_eos=True)) for n in (2, 5)]
    outputs: Any = llm.generate([*ready, IDS], use_tqdm=False)
    assert [output.outputs[0].length for output in outputs][:2] == [2, 5]
    assert one(llm.generate(ready[1])).outputs[0].length == 5
    assert one(llm.generate(ready[1], PARAMS)).outputs[0].length == 3
