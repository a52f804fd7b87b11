"""`SamplingFields`: what a request says about sampling, over HTTP and through the LLM API alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.sampling_spec import KNOBS, SamplingKnobs
from tensorweave.router.sampling.checks import (
    MAX_STOP_TOKEN_IDS,
    check_bad_words,
    check_bool,
    check_embedding_bias,
    check_ids,
    check_int,
    check_knob,
    check_logit_bias,
    check_processors,
    check_stop_strings,
)


@dataclass(kw_only=True, slots=True)
class SamplingFields(SamplingKnobs):
    """What a request says about sampling; None: it says nothing. What needs no model is checked on construction.

    Greedy is asked for by temperature 0, top_p 0, top_k 1 or min_p 1. `embedding_bias` is packed little-endian float32,
    one number for each token of the vocabulary. Names and meanings are those of `SamplingSpec`.
    """

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    bad_token_ids: Sequence[Sequence[int]] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    embedding_bias: bytes = field(default=b"", repr=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    wants_context_logits: bool = False
    wants_generation_logits: bool = False
    logits_processors: Sequence[str] = ()
    uses_batched_processor: bool = False

    def __post_init__(self) -> None:
        for name, knob in KNOBS.items():
            check_knob(name, knob, getattr(self, name))
        check_int("max_tokens", self.max_tokens, low=1, high=2**63 - 1)
        check_int("logprobs", self.logprobs, low=0)
        check_int("prompt_logprobs", self.prompt_logprobs, low=0)
        check_bool("ignore_eos", self.ignore_eos)
        check_bool("return_context_logits", self.wants_context_logits)
        check_bool("return_generation_logits", self.wants_generation_logits)
        check_bool("apply_batched_logits_processor", self.uses_batched_processor)
        check_stop_strings(self.stop)
        check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        check_bad_words(self.bad_token_ids)
        check_logit_bias(self.logit_bias)
        check_embedding_bias(self.embedding_bias)
        check_processors(self.logits_processors)
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise RequestRejected(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}", param="min_tokens"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1 or self.min_p == 1
