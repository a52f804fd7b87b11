"""`SamplingStates`: the sampling states of the requests that a gang runs, a resource that they hold like their KV."""

from __future__ import annotations

from tensorweave.workers.sampling.rules import make_rules
from tensorweave.workers.sampling.state import MakeRules, SamplingState
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import BaseResourceManager


class SamplingStates(BaseResourceManager):
    """A state is made when its request is first decoded, and made again after a pause."""

    def __init__(self, make_rules: MakeRules = make_rules) -> None:
        self._make_rules = make_rules
        self._by_request: dict[LlmRequest, SamplingState] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def state_of(self, request: LlmRequest) -> SamplingState:
        state = self._by_request.get(request)
        if state is None:
            prompt = request.tokens[: request.prompt_len]
            state = self._by_request[request] = SamplingState(request.sampling, prompt, self._make_rules)
        return state

    def free_resources(self, request: LlmRequest) -> None:
        self._by_request.pop(request, None)
