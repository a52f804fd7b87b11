"""`SamplingSpec`: how one sequence is sampled, as it crosses processes; and log-probabilities, as they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_bytes, as_flag, as_int, as_int_or_none, as_number, checked, tuple_of


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How one sequence is sampled, fully resolved: no None means "default", text is already token ids.

    Order: bias and banned words, penalties, temperature, min_p, top_k, top_p; `temperature == 0` is greedy, and every
    default below switches its field off. `seed` and the position alone decide the random number of each token, so a
    replay continues with the same tokens. `stop_token_ids` end the sequence once `min_tokens` are out; end-of-sequence
    ids are among them unless `ignore_eos` was asked. Stop strings are not here: whoever holds the detokenizer watches
    for them.

    Args:
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al.
            2019).
        presence_penalty: Taken once from the logit of each token in the output.
        frequency_penalty: Taken from a token's logit as many times as it is in the output.
        no_repeat_ngram_size: No n-gram of this size comes twice in prompt and output; 0: off.
        bad_words: Token sequences that never come to their end in the output.
        logit_bias: Added to the logits: (token id, bias) pairs.
        embedding_bias: Added to the logits: packed little-endian float32 [V], or empty.
        top_p_decay: Multiplies top_p after every token, down to `top_p_min`.
        top_p_reset_id: The token after which top_p starts anew; -1: none.
        num_logprobs: Likeliest tokens told with each output token beside the sampled one; None: no log-probabilities.
            They are the model's own: before bias, penalties and temperature.
        num_prompt_logprobs: The same for the prompt's tokens.
        wants_context_logits: Tell the logits at every prompt token.
        wants_generation_logits: Tell the logits that each output token was sampled from, as the model gave them.
        logits_processors: Names of callables that the executor holds; each edits this request's logits first.
        uses_batched_processor: The executor's batched processor edits this request's logits too.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    embedding_bias: bytes = field(default=b"", repr=False)
    top_p_decay: float = 1.0
    top_p_min: float = 0.0
    top_p_reset_id: int = -1
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    wants_context_logits: bool = False
    wants_generation_logits: bool = False
    logits_processors: tuple[str, ...] = ()
    uses_batched_processor: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def wants_extras(self) -> bool:
        """More than its id is told with each output token."""
        return self.num_logprobs is not None or self.wants_generation_logits

    @property
    def needs_prompt_rows(self) -> bool:
        """The prompt must be computed from its first token where it is answered: no cached KV, no KV from elsewhere."""
        return self.num_prompt_logprobs is not None or self.wants_context_logits

    def to_wire(self) -> dict[str, Any]:
        """What differs from the defaults."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in values.items() if n not in _SAMPLING_DEFAULTS or v != _SAMPLING_DEFAULTS[n]}

    @classmethod
    def from_wire(cls, fields: Any) -> SamplingSpec:
        values = {}
        for name, value in checked(fields, "sampling", dict).items():
            if (read := _SAMPLING_READERS.get(name)) is None:
                raise WireError(f"unknown sampling field {str(name)[:64]!r}")
            values[name] = read(value, name)
        if "max_tokens" not in values:
            raise WireError("sampling fields without max_tokens")
        return cls(**values)


def _bias(value: Any, name: str) -> tuple[int, float]:
    if len(checked(value, name, list, tuple)) != 2:
        raise WireError(f"{name} is not made of pairs")
    return as_int(value[0], name), as_number(value[1], name)


_SAMPLING_READERS: Final[dict[str, Callable[[Any, str], Any]]] = {
    **dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed", "no_repeat_ngram_size", "top_p_reset_id"), as_int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "top_p_decay", "top_p_min"), as_number),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), as_number),
    **dict.fromkeys(("num_logprobs", "num_prompt_logprobs"), as_int_or_none),
    **dict.fromkeys(("wants_context_logits", "wants_generation_logits", "uses_batched_processor"), as_flag),
    "stop_token_ids": tuple_of(as_int),
    "bad_words": tuple_of(tuple_of(as_int)),
    "logit_bias": tuple_of(_bias),
    "embedding_bias": as_bytes,
    "logits_processors": tuple_of(lambda value, name: checked(value, name, str)),
}
_SAMPLING_DEFAULTS: Final = {
    f.name: f.default for f in dataclasses.fields(SamplingSpec) if f.default is not dataclasses.MISSING
}


class Logprob(NamedTuple):
    """A token's natural log-probability, and its place among all tokens, the likeliest being 1."""

    token_id: int
    logprob: float
    rank: int

    @classmethod
    def from_wire(cls, fields: Any) -> Logprob:
        try:
            token_id, logprob, rank = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed log-probability: {error}") from None
        return cls(as_int(token_id, "token_id"), as_number(logprob, "logprob"), as_int(rank, "rank"))


TokenLogprobs = Sequence[Logprob]
"""Of one token: its own first, then the likeliest tokens from the first on (its own is told twice if it is one)."""


def logprobs_to_wire(logprobs: Sequence[TokenLogprobs]) -> list[Any]:
    return [[*token] for token in logprobs]


def logprobs_from_wire(fields: Any) -> list[TokenLogprobs]:
    tokens = checked(fields, "logprobs", list)
    return [tuple(Logprob.from_wire(p) for p in checked(token, "logprobs", list)) for token in tokens]
