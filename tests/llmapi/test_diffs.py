"""An output's diffs, for consumers that iterate, that wait for the end, and that do first one and then the other."""

from __future__ import annotations

import asyncio

import pytest

from tensorweave.cluster.logprobs import Logprob as Told
from tensorweave.llmapi.outputs import OutputOptions, RequestOutput, Update


def generated(num_tokens: int, *, index: int = 0, is_streaming: bool = True) -> RequestOutput:
    """A generation whose updates have all arrived: two sequences, the other one of a single token."""
    output = RequestOutput(
        0, "x", [1], num_sequences=2, is_streaming=is_streaming, options=OutputOptions(logprobs=True)
    )
    output._push(Update(index=1 - index, text="z", token_ids=[9], finish_reason="stop"))
    for number in range(num_tokens):
        reason = "length" if number == num_tokens - 1 else None
        told = [[Told(number, -1.0, 1)]]
        output._push(
            Update(index=index, text="abcdef"[number], token_ids=[number], logprobs=told, finish_reason=reason)
        )
    return output


def seen(output: RequestOutput, index: int = 0) -> tuple[str, list[int], int]:
    sequence = output.outputs[index]
    assert len(sequence.logprobs_diff) in (0, len(sequence.token_ids_diff))
    return sequence.text_diff, sequence.token_ids_diff, len(sequence.logprobs_diff)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_who_waits_for_the_end_sees_all_as_new(is_streaming: bool) -> None:
    output = generated(4, is_streaming=is_streaming).result(0)
    assert [seen(output), seen(output, 1)] == [("abcd", [0, 1, 2, 3], 4), ("z", [9], 0)]
    assert seen(output.result(0)) == ("abcd", [0, 1, 2, 3], 4), "nothing has come since"
    [again] = [asyncio.run(generated(4, is_streaming=is_streaming).aresult())]
    assert seen(again) == ("abcd", [0, 1, 2, 3], 4)


def test_an_iteration_without_streaming_sees_all_as_new() -> None:
    [output] = generated(4, is_streaming=False)
    assert seen(output) == ("abcd", [0, 1, 2, 3], 4)


def test_a_turn_brings_news_of_one_sequence() -> None:
    diffs = [(seen(output), seen(output, 1)) for output in generated(3)]
    nothing = ("", [], 0)
    assert diffs[0] == (nothing, ("z", [9], 0))
    assert diffs[1:] == [(("a", [0], 1), nothing), (("b", [1], 1), nothing), (("c", [2], 1), nothing)]


def test_the_rest_of_a_stream_is_new_to_who_then_waits() -> None:
    output = generated(5)
    iterator = iter(output)
    for _ in range(3):
        next(iterator)
    assert seen(output) == ("b", [1], 1)
    assert [seen(output.result(0)), seen(output, 1)] == [("cde", [2, 3, 4], 3), ("", [], 0)]


def test_a_late_cancel_of_what_has_ended_is_no_news() -> None:
    output = generated(2)
    output._updates._updates.insert(2, Update(index=1, finish_reason="cancelled"))
    assert "".join(each.outputs[1].text_diff for each in output) == "z"
    assert output.outputs[1].finish_reason == "stop"
