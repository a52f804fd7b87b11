"""`SamplingStates`: the sampling states of the requests that a gang runs, a resource that they hold like their KV."""

from __future__ import annotations

from collections.abc import Sequence

from tensorweave.workers.sampling.device_counts import DeviceCounts
from tensorweave.workers.sampling.grammar_rule import GrammarRule
from tensorweave.workers.sampling.state import MakeRules, SamplingRule, SamplingState
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import BaseResourceManager


class SamplingStates(BaseResourceManager):
    """A state is made when its request is first decoded, and made again after a pause.

    Args:
        counts: Where the device counts tokens for penalties, with `counts_on_device`.
    """

    def __init__(self, make_rules: MakeRules, counts: DeviceCounts, *, counts_on_device: bool) -> None:
        self._make_rules = make_rules
        self._counts = counts
        self._counts_on_device = counts_on_device
        self._by_request: dict[LlmRequest, SamplingState] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def state_of(self, request: LlmRequest) -> SamplingState:
        state = self._by_request.get(request)
        if state is None:
            prompt = request.tokens[: request.prompt_len]
            state = self._by_request[request] = SamplingState(
                request.sampling,
                prompt,
                self._make_rules,
                counts_on_device=self._counts_on_device,
                more_rules=_grammar_rules(request),
            )
        return state

    def free_resources(self, request: LlmRequest) -> None:
        self._by_request.pop(request, None)
        self._counts.release(request)


def _grammar_rules(request: LlmRequest) -> Sequence[SamplingRule]:
    if request.sampling.guide is None:
        return ()
    assert request.grammar is not None, f"request {request.request_id} has arrived without its grammar"
    return (GrammarRule(request.grammar, request.sampling.stop_token_ids),)
