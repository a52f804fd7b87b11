"""Drafts in gangs of several ranks and in pairs of gangs: the answers are those of one rank without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tensorweave.cluster.protocol import SamplingSpec
from tests.workers.engine_drive import random_prompts
from tests.workers.speculation.drafted_run import Guess, guesses, ngram_config, user_config
from tests.workers.tiny_models import VOCAB, make_model
from tests.workers.transfer_drive import Answer, Gang, hash_gang, model_gang, run_aggregated, run_disaggregated

MAX_TOKENS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", path, head_dim=32, intermediate_size=96)  # each rank's share suits the native kernels
    return path


def prompts_and_samplings(vocab: int) -> tuple[list[list[int]], list[SamplingSpec]]:
    prompts = [prompt * 3 for prompt in random_prompts(12, 25, vocab=vocab)]
    samplings = [
        SamplingSpec(
            MAX_TOKENS,
            num_logprobs=i % 3 or None,
            temperature=float(i % 2),
            seed=i,
            stop_token_ids=tuple(range(5, vocab, 37)) if i % 4 == 3 else (),
            repetition_penalty=1.2 if i % 5 == 4 else 1.0,
        )
        for i in range(len(prompts))
    ]
    return prompts, samplings


def recorded(prompts: Sequence[list[int]], answers: Sequence[Answer]) -> dict[int, list[int]]:
    return {i: [*prompt, *answer.tokens] for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)}


def by_prompt(guess: Guess, prompts: Sequence[list[int]]) -> Guess:
    """A request's number is that of its prompt, in whatever order requests come."""

    def find(_: int, tokens: Sequence[int], most: int) -> Sequence[int]:
        number = next(n for n, prompt in enumerate(prompts, 1) if list(tokens[: len(prompt)]) == prompt)
        return guess(number, tokens, most)

    return find


def close(gang: Gang) -> float:
    gang.wait_idle()
    return gang.gauge("accepted_draft_tokens_total")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("drafter", ["ngram", "right", "mixed"])
def test_ranks_draft_alike(size: int, drafter: str, model: Path) -> None:
    """With two or three ranks the sums are those of the same ranks without drafts."""
    prompts, samplings = prompts_and_samplings(VOCAB)
    with model_gang(model, size, None) as gang:
        want = run_aggregated(gang, prompts, samplings)
    guess = guesses(recorded(prompts, want), VOCAB).get(drafter)
    config = ngram_config() if guess is None else user_config(by_prompt(guess, prompts))
    with model_gang(model, size, None, speculative=config) as gang:
        assert run_aggregated(gang, prompts, samplings) == want
        assert close(gang)


@pytest.mark.parametrize("drafter", ["ngram", "right", "wrong", "mixed"])
def test_a_pair_of_gangs_answers_as_one_without_drafts(drafter: str, model: Path) -> None:
    """The prefill gang has the same configuration, and drafts nothing: its requests end at their first token."""
    prompts, samplings = prompts_and_samplings(VOCAB)
    with model_gang(model, 1, None) as gang:
        want = run_aggregated(gang, prompts, samplings)
    guess = guesses(recorded(prompts, want), VOCAB).get(drafter)
    config: Any = ngram_config() if guess is None else user_config(by_prompt(guess, prompts))
    with model_gang(model, speculative=config) as prefill, model_gang(model, speculative=config) as decode:
        got = run_disaggregated(prefill, decode, prompts, samplings)
        assert [(a.tokens, a.logprobs, a.finish_reason) for a in got] == [
            (a.tokens, a.logprobs, a.finish_reason) for a in want
        ]
        prefill.wait_idle()
        assert prefill.gauge("draft_tokens_total") == 0
        assert decode.gauge("draft_tokens_total") > 0
        assert bool(close(decode)) == (drafter != "wrong")
        assert decode.gauge("kv_transfer_blocks_total")


def test_what_was_drafted_in_vain_is_never_given_away() -> None:
    """The second turn of each chat goes through another gang, which fetches the first one's blocks from this one."""
    prompts, samplings = prompts_and_samplings(1000)
    with hash_gang(1, None, num_blocks=400) as gang:
        want = run_aggregated(gang, prompts, samplings)
        turns = [[*prompt, *answer.tokens, 7] for prompt, answer in zip(prompts, want, strict=True)]
        want_next = run_aggregated_again(gang, turns, samplings)
    guess = by_prompt(guesses(recorded(prompts, want), 1000)["mixed"], prompts)
    with hash_gang(1, num_blocks=400, speculative=user_config(guess)) as first, hash_gang(1, num_blocks=400) as second:
        assert [a.tokens for a in run_aggregated(first, prompts, samplings)] == [a.tokens for a in want]
        got = run_disaggregated(first, second, turns, samplings, name="next")
        assert [a.tokens for a in got] == [a.tokens for a in want_next]
        assert close(first)
        second.wait_idle()


def run_aggregated_again(gang: Gang, prompts: Sequence[list[int]], samplings: Sequence[SamplingSpec]) -> list[Answer]:
    gang.wait_idle()
    return run_aggregated(gang, prompts, samplings)
