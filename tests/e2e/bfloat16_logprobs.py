"""Log-probabilities of an engine in bfloat16 beside those of transformers' model, in float32 and in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorweave import LLM, RequestOutput, SamplingParams

NUM_TOP = 4
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=NUM_TOP, prompt_logprobs=NUM_TOP)


@dataclass(frozen=True)
class Errors:
    """Of log-probabilities against those of float32 arithmetic on the same weights."""

    mean: float
    largest: float

    @classmethod
    def of(cls, differences: Tensor) -> Errors:
        return cls(differences.abs().mean().item(), differences.abs().max().item())


def measure(llm: LLM, theirs: Any, prompts: Sequence[Sequence[int]]) -> tuple[Errors, Errors]:
    """Our errors, and those of transformers in bfloat16, at the tokens that we report: each token of prompt and answer
    and the likeliest ones beside it. `theirs` is in float32, and in bfloat16 afterwards."""
    outputs = llm.generate([list(prompt) for prompt in prompts], PARAMS, use_tqdm=False)
    assert isinstance(outputs, list)
    exact = [_at_reported(theirs, output) for output in outputs]
    theirs.bfloat16()
    rounded = [_at_reported(theirs, output) for output in outputs]
    ours = [_reported(output)[1] for output in outputs]
    return Errors.of(torch.cat(ours) - torch.cat(exact)), Errors.of(torch.cat(rounded) - torch.cat(exact))


def _reported(output: RequestOutput) -> tuple[list[tuple[int, int]], Tensor]:
    """(Place of the token before, token) of each log-probability that is reported, and these."""
    answer = output.outputs[0]
    entries = [*answer.prompt_logprobs, *answer.logprobs]
    places = [(at, token) for at, entry in enumerate(entries) for token in entry]
    return places, torch.tensor([each.logprob for entry in entries for each in entry.values()])


def _at_reported(model: Any, output: RequestOutput) -> Tensor:
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    rows, tokens = torch.tensor(_reported(output)[0]).unbind(1)
    return logprobs_TV[rows, tokens]
