"""Requests made of several prompts at once: shared parameters are read once, and nothing else is shared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tensorweave import SamplingParams
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import ModelInfo
from tensorweave.llmapi.engine import Engine
from tensorweave.llmapi.options import options_per_prompt
from tensorweave.llmapi.request_maker import PreparedRequest, RequestMaker

INFO = ModelInfo("tiny", 100, 64, "float32", 32, 8, (2,))


def made(params: SamplingParams | list[SamplingParams], num_prompts: int = 3) -> list[PreparedRequest]:
    maker = RequestMaker("llm", TorchLlmArgs(model="tiny"), None, cast(Engine, SimpleNamespace(info=INFO)))
    given = params if isinstance(params, list) else [params] * num_prompts
    return maker.make_all([[1, 2, 3 + n] for n in range(len(given))], given, options_per_prompt(len(given)))


def test_requests_of_one_call_are_told_apart() -> None:
    requests = [prepared.jobs[0].request for prepared in made(SamplingParams(max_tokens=5))]
    assert [request.request_id for request in requests] == ["llm-0", "llm-1", "llm-2"]
    assert [list(request.prompt_token_ids) for request in requests] == [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert {request.sampling for request in requests} == {requests[0].sampling}
    assert {request.answer_every for request in requests} == {32}


def test_each_has_a_seed_of_its_own_unless_one_was_given() -> None:
    drawn = made(SamplingParams(max_tokens=5, temperature=1.0), num_prompts=50)
    assert len({prepared.jobs[0].request.sampling.seed for prepared in drawn}) == 50
    given = made(SamplingParams(max_tokens=5, temperature=1.0, seed=7))
    assert {prepared.jobs[0].request.sampling.seed for prepared in given} == {7}


def test_different_parameters_stay_different() -> None:
    params = [SamplingParams(max_tokens=n) for n in (3, 4, 3)]
    assert [prepared.jobs[0].request.sampling.max_tokens for prepared in made(params)] == [3, 4, 3]


def test_logits_processors_are_named_for_their_request() -> None:
    names = [list(prepared.processors) for prepared in made(SamplingParams(logits_processor=lambda *_: None))]
    assert names == [["llm-0.0"], ["llm-1.0"], ["llm-2.0"]]


@pytest.mark.parametrize("ids", [[1, True], [1, 2.0], [1, "2"]])
def test_what_is_not_an_id_is_refused(ids: list[Any]) -> None:
    maker = RequestMaker("llm", TorchLlmArgs(model="tiny"), None, cast(Engine, SimpleNamespace(info=INFO)))
    [options] = options_per_prompt(1)
    with pytest.raises(ValueError, match="must be integers"):
        maker.make(ids, SamplingParams(), options)
