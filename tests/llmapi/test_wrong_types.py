"""Fields of a wrong type, or set after they were checked: a ValueError that names them; and what used to slip by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tensorweave import LLM, CacheTransceiverConfig, DisaggregatedParams, SamplingParams
from tests.llmapi.small_llm import CACHE, one, write_small_model

PROMPT = [9, 8, 7, 30, 31, 32]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    directory = write_small_model(tmp_path_factory.mktemp("llama"))
    transceiver = CacheTransceiverConfig(backend="DEFAULT")
    with LLM(directory, dtype="float32", kv_cache_config=CACHE, cache_transceiver_config=transceiver) as made:
        yield made


@pytest.mark.parametrize("value", ["no", 1, None])
@pytest.mark.parametrize(
    "name",
    [
        "include_stop_str_in_output",
        "detokenize",
        "add_special_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "exclude_input_from_output",
        "return_perf_metrics",
        "ignore_eos",
        "return_context_logits",
        "return_generation_logits",
        "apply_batched_logits_processor",
    ],
)
def test_a_switch_is_on_or_off(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a boolean"):
        llm.generate("hello", SamplingParams(**{name: value}))


def test_a_bad_word_that_is_no_text(llm: LLM) -> None:
    with pytest.raises(ValueError, match="bad holds a lone surrogate"):
        llm.generate(PROMPT, SamplingParams(bad="\ud800"))


def test_a_prompt_made_ready_is_still_cut(llm: LLM) -> None:
    ready = llm.preprocess("one two three four five")
    cut = llm.generate_async(ready, SamplingParams(max_tokens=1, truncate_prompt_tokens=3)).result(60)
    assert cut.prompt_token_ids == list(ready.prompt_token_ids)[-3:]
    assert len(ready.prompt_token_ids) > 3


def test_a_phase_that_was_changed_is_checked_again(llm: LLM) -> None:
    phase = DisaggregatedParams()
    phase.request_type = "generation"
    with pytest.raises(ValueError, match="request_type is 'generation'"):
        llm.generate(PROMPT, disaggregated_params=phase)
    phase.request_type = "CONTEXT_ONLY"
    output = one(llm.generate(PROMPT, SamplingParams(ignore_eos=True), disaggregated_params=phase)).outputs[0]
    assert output.finish_reason == "not_finished"


def test_a_context_phase_tells_its_logits(llm: LLM) -> None:
    prompt = PROMPT * 20
    params = SamplingParams(max_tokens=4, ignore_eos=True, return_context_logits=True, prompt_logprobs=1)
    whole = one(llm.generate(prompt, params))
    phase = DisaggregatedParams(request_type="context_only")
    first = one(llm.generate(prompt, params, disaggregated_params=phase))
    assert whole.context_logits is not None
    assert first.context_logits is not None
    assert first.context_logits.shape == whole.context_logits.shape
    assert float((first.context_logits - whole.context_logits).abs().max()) < 1e-4
    assert first.outputs[0].token_ids == whole.outputs[0].token_ids[:1]
    assert [list(entry) for entry in first.outputs[0].prompt_logprobs] == [
        list(entry) for entry in whole.outputs[0].prompt_logprobs
    ]
