"""`SamplingParams.guided_decoding`: the forms that an output can have, and errors that are one request's own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tensorweave import LLM, GuidedDecodingParams, RequestOutput, SamplingParams
from tensorweave.cluster.errors import TensorweaveError
from tensorweave.workers.guided import admission
from tensorweave.workers.guided.compilers import Compilers
from tests.llmapi.small_llm import CACHE, one
from tests.workers.waiting import WAIT_S, wait_until

PROMPT = "The capital of"


class Place(BaseModel):
    kind: Literal["city", "river"]
    size: int
    is_old: bool


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as made:
        yield made


class HeldCompilers:
    """No grammar is ready before it may be, however fast it is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_compiled, self.may_end = threading.Event(), threading.Event()
        compile_guide = Compilers.compile

        def compile_and_wait(*given: Any) -> Any:
            grammar = compile_guide(*given)
            self.has_compiled.set()
            assert self.may_end.wait(WAIT_S)
            return grammar

        monkeypatch.setattr(Compilers, "compile", compile_and_wait)
        monkeypatch.setattr(admission, "READY_TIMEOUT_S", 10 * WAIT_S)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldCompilers]:
    compilers = HeldCompilers(monkeypatch)
    yield compilers
    compilers.may_end.set()


def asks(max_tokens: int = 200, seed: int | None = 1, **guide: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=1.0, seed=seed, guided_decoding=GuidedDecodingParams(**guide)
    )


def text_of(output: Any) -> str:
    [answer] = one(output).outputs
    assert answer.finish_reason == "stop"
    return answer.text


@pytest.mark.parametrize("schema", [Place, Place.model_json_schema(), json.dumps(Place.model_json_schema())])
def test_a_schema_may_be_a_model_a_dict_or_text(llm: LLM, schema: Any) -> None:
    Place.model_validate_json(text_of(llm.generate(PROMPT, asks(json=schema))))


def test_other_forms(llm: LLM) -> None:
    assert text_of(llm.generate(PROMPT, asks(regex="[ab]{2,4}"))).strip("ab") == ""
    assert text_of(llm.generate(PROMPT, asks(choice=["yes", "no (?)"]))) in ("yes", "no (?)")
    assert text_of(llm.generate(PROMPT, asks(grammar='root ::= "a" [bc]'))) in ("ab", "ac")
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "Paris"}}
    assert text_of(llm.generate(PROMPT, asks(structural_tag=json.dumps(tag)))) == "Paris"
    begun = one(llm.generate(PROMPT, asks(json_object=True, max_tokens=20))).outputs[0]
    assert begun.text.startswith("{")


def test_none_of_them_is_no_guide(llm: LLM) -> None:
    free = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    outputs = llm.generate([PROMPT] * 2, [asks(20), free], use_tqdm=False)
    assert isinstance(outputs, list)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_each_of_n_sequences_has_the_form_and_a_seed_of_its_own(llm: LLM) -> None:
    params = asks(json=Place, seed=7)
    params.n = 4
    texts = [answer.text for answer in one(llm.generate(PROMPT, params)).outputs]
    assert len(set(texts)) > 1
    for index, text in enumerate(texts):
        Place.model_validate_json(text)
        assert text == text_of(llm.generate(PROMPT, asks(json=Place, seed=7 + index)))


def test_a_stream_adds_up(llm: LLM) -> None:
    stream = llm.generate_async(PROMPT, asks(json=Place), streaming=True)
    text = "".join(partial.outputs[0].text_diff for partial in stream)
    assert text == text_of(llm.generate(PROMPT, asks(json=Place)))


def test_a_batch_says_what_each_request_says_alone(llm: LLM) -> None:
    free = [SamplingParams(max_tokens=30, temperature=1.0, seed=seed) for seed in range(4)]
    params = [each for seed in range(4) for each in (asks(json=Place, seed=seed), free[seed])]
    together = llm.generate([PROMPT] * 8, params, use_tqdm=False)
    alone = [one(llm.generate(PROMPT, each)) for each in params]
    assert isinstance(together, list)
    assert [out.outputs[0].token_ids for out in together] == [out.outputs[0].token_ids for out in alone]


def test_a_stop_string_cuts_the_text_off(llm: LLM) -> None:
    params = asks(regex="a{5}=[0-9]{3}")
    params.stop = "="
    answer = one(llm.generate(PROMPT, params)).outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("aaaaa", "stop", "=")


@pytest.mark.parametrize(
    ("fields", "guide", "says"),
    [
        ({"min_tokens": 30}, {"regex": "a"}, "min_tokens"),
        ({"ignore_eos": True}, {"regex": "a"}, "ignore_eos"),
        ({"bad": ["yes", "no"], "bad_token_ids": [[84], [92]]}, {"regex": "r"}, "no token is left"),
        ({}, {"regex": "(.*)*x(.*)*y(.*)*z"}, "20 ms|refused"),
        ({}, {"structural_tag": '{"type": "structural_tag", "format": {"type": "nothing"}}'}, "nothing"),
    ],
)
def test_what_cannot_be_is_that_requests_own_error(
    llm: LLM, fields: dict[str, Any], guide: dict[str, Any], says: str
) -> None:
    """Others in the same steps go on."""
    other = llm.generate_async(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True), streaming=True)
    params = asks(**guide)
    for name, value in fields.items():
        setattr(params, name, value)
    with pytest.raises((ValueError, TensorweaveError), match=says):
        llm.generate(PROMPT, params)
    assert other.result(WAIT_S).outputs[0].length == 400


def test_a_request_may_be_aborted_while_its_grammar_is_compiled(llm: LLM, held: HeldCompilers) -> None:
    waiting = llm.generate_async(PROMPT, asks(choice=[f"{number:05}" for number in range(1000)]))
    assert held.has_compiled.wait(WAIT_S)
    waiting.abort()
    assert waiting.result(WAIT_S).outputs[0].finish_reason == "cancelled"
    held.may_end.set()
    assert text_of(llm.generate(PROMPT, asks(regex="[ab]"))) in "ab"


def test_eight_streams_go_on_while_a_grammar_is_compiled(llm: LLM, held: HeldCompilers) -> None:
    """They get tokens in the meantime: the step loop does not wait for it. One paces all, so that none ends before."""
    stop = threading.Event()
    params = SamplingParams(max_tokens=900, ignore_eos=True)  # the KV cache has room for all of them
    paced = replace(params, logits_processor=lambda *given: time.sleep(0.05))
    streams = [llm.generate_async([5, 6, number], params if number else paced, streaming=True) for number in range(8)]
    lengths = [0] * 8

    def follow(number: int) -> None:
        for partial in streams[number]:
            lengths[number] = partial.outputs[0].length
            if stop.is_set():
                return

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(lengths) > 0)
    costly = llm.generate_async(PROMPT, asks(choice=[f"{number:05}" for number in range(2000)]))
    before = list(lengths)
    wait_until(lambda: all(now >= then + 20 for now, then in zip(lengths, before, strict=True)))
    assert not costly.finished, "it is still being compiled"
    costly.abort()
    stop.set()
    for stream, thread in zip(streams, threads, strict=True):
        stream.abort()
        thread.join(WAIT_S)


def test_it_can_be_switched_off(directory: Path) -> None:
    with LLM(directory, dtype="float32", kv_cache_config=CACHE, guided_decoding_backend=None) as off:
        with pytest.raises(ValueError, match="guided_decoding_backend"):
            off.generate(PROMPT, asks(regex="a"))
        assert isinstance(off.generate(PROMPT, SamplingParams(max_tokens=2)), RequestOutput)


def test_the_form_is_that_of_the_text_after_the_reasoning(directory: Path) -> None:
    """If the model's form of reasoning is named; the prompt may have opened it, or closed it."""
    with LLM(directory, dtype="float32", kv_cache_config=CACHE, reasoning_parser="qwen3") as llm:
        for seed in range(8):
            params = asks(regex="[ab]{2,4}", seed=seed, max_tokens=100)
            assert text_of(llm.generate("<think>Hm.</think>", params)).strip("ab") == ""
            for prompt in (PROMPT, "<think>"):
                [answer] = one(llm.generate(prompt, params)).outputs
                _, end, text = answer.text.rpartition("</think>")
                if answer.finish_reason == "stop":
                    assert set(text.strip("\n")) <= set("ab")
                    assert end or prompt == PROMPT
                else:
                    assert not answer.text.startswith(("aa", "ab", "ba", "bb"))
    with pytest.raises(ValueError, match="reasoning_parser: unknown format 'qwen33'"):
        LLM(directory, reasoning_parser="qwen33")
