"""An LLM whose tokenizer drops a text's first space: answers continue their prompt correctly, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, SamplingParams
from tests.llmapi.small_llm import CACHE, one
from tests.router.small_tokenizers import llama2

SCRIPT: list[int] = llama2().backend.convert_tokens_to_ids(["▁the", "▁cap", "ital", "▁the"])


@pytest.fixture(scope="module", params=["auto", "slow"])
def llm(request: pytest.FixtureRequest, directory: Path) -> Iterator[LLM]:
    with LLM(
        directory,
        tokenizer=llama2().backend,
        tokenizer_mode=request.param,
        dtype="float32",
        kv_cache_config=CACHE,
    ) as made:
        yield made


def scripted(prompt: list[int], **fields: Any) -> SamplingParams:
    def force(req_id: int, logits: Any, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        logits[..., SCRIPT[len(token_ids[0]) - len(prompt)]] += 1000.0

    return SamplingParams(max_tokens=len(SCRIPT), ignore_eos=True, logits_processor=force, **fields)


def test_text_and_diffs_keep_their_leading_space(llm: LLM) -> None:
    prompt = llama2().encode("b")
    for fields in ({}, {"skip_special_tokens": False}, {"n": 2, "temperature": 1.0}):
        outputs = one(llm.generate("b", scripted(prompt, **fields))).outputs
        assert [output.text for output in outputs] == [" the capital the"] * fields.get("n", 1)
    future = llm.generate_async("b", scripted(prompt), streaming=True)
    assert "".join([part.outputs[0].text_diff for part in future]) == " the capital the"


@pytest.mark.parametrize("skips", [True, False])
def test_an_output_that_begins_with_its_prompt_reads_as_its_tokens(llm: LLM, skips: bool) -> None:
    for text in ("b", "é the"):
        prompt = llama2().encode(text)
        fields = {"exclude_input_from_output": False, "skip_special_tokens": skips, "n": 2, "temperature": 1.0}
        for output in one(llm.generate(text, scripted(prompt, **fields))).outputs:
            assert output.token_ids == [*prompt, *SCRIPT]
            assert output.text == llama2().decode(output.token_ids, skip_special_tokens=skips)


def test_the_first_text_of_all_and_stop_strings(llm: LLM) -> None:
    begins = llama2().encode("")
    assert one(llm.generate(begins, scripted(begins))).outputs[0].text == "the capital the"
    prompt = llama2().encode("b")
    stopped = one(llm.generate("b", scripted(prompt, stop=" the", include_stop_str_in_output=True))).outputs[0]
    assert (stopped.text, stopped.token_ids) == (" the", SCRIPT[:1])
    later = one(llm.generate("b", scripted(prompt, stop=" the", min_tokens=2))).outputs[0]
    assert (later.text, later.stop_reason) == (" the capital", " the")
