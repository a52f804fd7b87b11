"""What an LLM reports besides tokens: log-probabilities and logits, equal to a plain forward's; n, best_of, diffs and
times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave import LLM, CompletionOutput, SamplingParams
from tests.llmapi.small_llm import CACHE, one

PROMPT = [9, 8, 7, 30, 31, 32, 9, 8, 7, 60]


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as made:
        yield made


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).float().eval()


def plain_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] of transformers' own forward."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)])).logits[0]
    return logits


def check_logprobs(told: Sequence[dict[int, Any]], logits: torch.Tensor, tokens: Sequence[int], num_top: int) -> None:
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert len(told) == len(tokens) == len(expected)
    for entry, row, token in zip(told, expected, tokens, strict=True):
        assert next(iter(entry)) == token
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry[token].rank == int((row > row[token]).sum()) + 1
        assert set(entry) == {token, *row.topk(num_top).indices.tolist()}


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("num_top", [0, 5])
def test_logprobs_are_the_models_own(llm: LLM, theirs: Any, num_top: int, temperature: float | None) -> None:
    params = SamplingParams(
        max_tokens=8, temperature=temperature, seed=3, frequency_penalty=1.5, logprobs=num_top, ignore_eos=True
    )
    output = one(llm.generate(PROMPT, params)).outputs[0]
    logits = plain_logits(theirs, [*PROMPT, *output.token_ids])[len(PROMPT) - 1 : -1]
    check_logprobs(output.logprobs, logits, output.token_ids, num_top)
    own = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(own))
    assert output.prompt_logprobs == []


def test_prompt_logprobs_and_logits(llm: LLM, theirs: Any) -> None:
    params = SamplingParams(
        max_tokens=4,
        prompt_logprobs=2,
        return_context_logits=True,
        return_generation_logits=True,
        ignore_eos=True,
        repetition_penalty=1.8,
    )
    llm.generate(PROMPT * 8, SamplingParams(max_tokens=1))  # its blocks are cached now, and must not be used
    result = one(llm.generate(PROMPT * 8, params))
    output = result.outputs[0]
    logits = plain_logits(theirs, [*PROMPT * 8, *output.token_ids])
    num_prompt = len(PROMPT * 8)
    check_logprobs(output.prompt_logprobs, logits[: num_prompt - 1], (PROMPT * 8)[1:], 2)
    assert result.context_logits is not None
    assert output.generation_logits is not None
    torch.testing.assert_close(result.context_logits, logits[:num_prompt], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(output.generation_logits, logits[num_prompt - 1 : -1], atol=1e-3, rtol=1e-3)
    assert output.logprobs == []
    plain = one(llm.generate(PROMPT, SamplingParams(max_tokens=2)))
    assert (plain.context_logits, plain.outputs[0].generation_logits) == (None, None)


def told(output: CompletionOutput) -> tuple[list[int], str]:
    return output.token_ids, output.text


def test_n_sequences_have_seeds_in_a_row(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=7, temperature=1.0, seed=40, ignore_eos=True, prompt_logprobs=0)
    result = one(llm.generate(PROMPT, params))
    assert [output.index for output in result.outputs] == [0, 1, 2]
    for place, output in enumerate(result.outputs):
        alone = SamplingParams(max_tokens=7, temperature=1.0, seed=40 + place, ignore_eos=True)
        assert told(output) == told(one(llm.generate(PROMPT, alone)).outputs[0])
        assert len(output.prompt_logprobs) == len(PROMPT) - 1


def test_best_of_returns_the_likeliest(llm: LLM) -> None:
    sampling: dict[str, Any] = {"max_tokens": 6, "temperature": 1.2, "ignore_eos": True}
    every = one(llm.generate(PROMPT, SamplingParams(n=6, seed=5, logprobs=0, **sampling))).outputs
    ranked = sorted(every, key=lambda output: -(output.cumulative_logprob or 0.0))
    best = one(llm.generate(PROMPT, SamplingParams(n=2, best_of=6, seed=5, **sampling))).outputs
    assert [told(output) for output in best] == [told(output) for output in ranked[:2]]
    assert [output.cumulative_logprob for output in best] == pytest.approx([o.cumulative_logprob for o in ranked[:2]])
    assert [(output.index, output.logprobs) for output in best] == [(0, []), (1, [])]
    with pytest.raises(ValueError, match="streamed"):
        llm.generate_async(PROMPT, SamplingParams(n=2, best_of=6, **sampling), streaming=True)


def test_diffs_of_several_sequences_add_up(llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=9, temperature=1.0, seed=1, logprobs=1, ignore_eos=True)
    whole = one(llm.generate("France", params)).outputs
    texts, ids, logprobs = ["", ""], [list[int](), list[int]()], [list[Any](), list[Any]()]
    for partial in llm.generate_async("France", params, streaming=True):
        for place, output in enumerate(partial.outputs):
            texts[place] += output.text_diff
            ids[place] += output.token_ids_diff
            logprobs[place] += output.logprobs_diff
    assert texts == [output.text for output in whole]
    assert ids == [output.token_ids for output in whole]
    assert logprobs == [output.logprobs for output in whole]
    assert [len(entries) for entries in logprobs] == [9, 9]


def test_a_stop_string_ends_the_logprobs_too(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=0)
    free = one(llm.generate("France", params)).outputs[0]
    cut = one(llm.generate("France", SamplingParams(max_tokens=30, ignore_eos=True, logprobs=0, stop=free.text[3:6])))
    assert len(cut.outputs[0].logprobs) == cut.outputs[0].length < 30


def test_outputs_may_begin_with_their_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, stop="France")
    alone = one(llm.generate("France is", params))
    whole = SamplingParams(max_tokens=5, ignore_eos=True, stop="France", exclude_input_from_output=False)
    future = llm.generate_async("France is", whole, streaming=True)
    text, ids = "", list[int]()
    for partial in future:
        text += partial.outputs[0].text_diff
        ids += partial.outputs[0].token_ids_diff
    assert ids == future.outputs[0].token_ids == [*alone.prompt_token_ids, *alone.outputs[0].token_ids]
    assert text == future.outputs[0].text == "France is" + alone.outputs[0].text


def test_times_are_told_where_asked_for(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, return_perf_metrics=True)
    metrics = one(llm.generate(PROMPT, params)).outputs[0].request_perf_metrics
    assert metrics is not None
    times = metrics.timing_metrics
    assert times.arrival_time <= times.first_token_time <= times.last_token_time
    assert one(llm.generate(PROMPT)).outputs[0].request_perf_metrics is None


def test_cached_tokens_and_numbers(llm: LLM) -> None:
    prompt = [5 + n % 90 for n in range(130)]
    first, again = (one(llm.generate(prompt, SamplingParams(max_tokens=2))) for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 128)
    assert again.request_id == first.request_id + 1
