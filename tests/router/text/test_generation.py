"""A stop string that several tokens of one chunk complete: the answer has the tokens up to it, in whatever chunks."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.generation import Job, _text_of
from tests.router.calls import COMPLETIONS, TEXT, post, scripted
from tests.router.serving import completion, script_of
from tests.router.small_tokenizers import byte_level

STOPS = ["aus", "京 ", "😀", "never"]


def answered(tokens_per_step: int, **fields: Any) -> dict[str, Any]:
    body = completion(max_tokens=100, logprobs=1, return_token_ids=True, **fields)
    answer = post(COMPLETIONS, body, scripted(tokens_per_step=tokens_per_step)).json()
    return {"choices": answer["choices"], "usage": answer["usage"]}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("is_included", [False, True])
def test_the_answer_does_not_depend_on_the_steps(stop: str, is_included: bool) -> None:
    fields = {"stop": [stop, "nothing else"], "include_stop_str_in_output": is_included}
    expected = answered(1, **fields)
    assert expected["choices"][0]["stop_reason"] == (stop if stop in TEXT else None)
    for tokens_per_step in (2, 3, 5, 100):
        assert answered(tokens_per_step, **fields) == expected


def test_what_is_told_beside_the_tokens_is_cut_with_them() -> None:
    ids = script_of(TEXT)
    rows = b"".join([bytes([place]) * 8 for place in range(len(ids))])
    detokenizer = IncrementalDetokenizer(byte_level(), stop=["aus"])
    job = Job(0, GenerateRequest("r", [1], SamplingSpec(100)), detokenizer, frozenset())
    delta = _text_of(job, TokenChunk("r", ids, logits=rows))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("Grüße ", "stop", "aus")
    assert byte_level().decode(delta.token_ids) == "Grüße aus"
    assert delta.logits == rows[: 8 * len(delta.token_ids)]
