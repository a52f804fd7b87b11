"""The sampling fields of a request: `SamplingKnobs` as they are asked for, `SamplingSpec` as an executor runs them.

A knob is a number that has one name and one meaning over HTTP, in `SamplingParams`, in a checkpoint's defaults, on the
wire and in a spec. It is defined here and nowhere else: a field of `SamplingKnobs` has its range and what it means, a
field of `SamplingSpec` the value that switches it off. HTTP bodies, `SamplingParams`, their checks, the wire form and
docs/sampling.md follow from that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_bytes, as_flag, as_int, as_int_or_none, as_number, checked, tuple_of
from tensorweave.cluster.guide import Guide, guide_or_none

MAX_INT: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """The definition of a knob.

    Args:
        doc: What it means, for users.
        is_integer: An integer, else a float.
        low: The least value, or, with `is_low_open`, the bound that it must be above.
        high: The greatest value.
        off_alias: A request may give this instead of the value that switches it off.
        http_high: The greatest value over HTTP, where OpenAI has a bound of its own.
        is_extension: OpenAI's API does not have it.
        is_random: It says how tokens are drawn: a greedy request has no use for it.
        status: That of `SamplingParams`' field, as long as it is not committed.
    """

    doc: str
    is_integer: bool = False
    low: float = 0
    high: float = math.inf
    off_alias: int | None = None
    http_high: float | None = None
    is_low_open: bool = False
    is_extension: bool = True
    is_random: bool = False
    status: str | None = None

    @property
    def asked_low(self) -> float:
        """The least value that a request may give."""
        return self.low if self.off_alias is None else min(self.low, self.off_alias)

    def read(self, value: Any, name: str) -> Any:
        """A value as it came over the wire. Raises WireError."""
        return (as_int if self.is_integer else as_number)(value, name)


def _asked(doc: str, **definition: Any) -> Any:
    knob = Knob(doc=doc, **definition)
    return field(default=None, metadata={"knob": knob, "status": knob.status})


@dataclass(kw_only=True, slots=True)
class SamplingKnobs:
    """What a request, or a checkpoint, asks for; None: it says nothing."""

    temperature: float | None = _asked(
        "Divides the logits: above 1 the distribution is flatter, below 1 sharper. 0 is greedy.",
        http_high=2,
        is_extension=False,
        is_random=True,
    )
    top_k: int | None = _asked(
        "Sample among the k likeliest tokens; 0 or -1: among all.",
        is_integer=True,
        high=MAX_INT,
        off_alias=-1,
        is_random=True,
    )
    top_p: float | None = _asked(
        "Sample among the likeliest tokens that together reach this probability.",
        high=1,
        is_extension=False,
        is_random=True,
    )
    top_p_decay: float | None = _asked("Multiplies top_p after every token.", is_low_open=True, high=1, is_random=True)
    top_p_min: float | None = _asked("The least value that top_p decays to.", is_low_open=True, high=1, is_random=True)
    top_p_reset_ids: int | None = _asked(
        "The token id after which top_p has its first value again.",
        is_integer=True,
        high=MAX_INT,
        is_random=True,
    )
    min_p: float | None = _asked(
        "Drop tokens less likely than this fraction of the likeliest token's probability.", high=1, is_random=True
    )
    seed: int | None = _asked(
        "Determines the random numbers. Without one, a new seed is drawn for each request.",
        is_integer=True,
        low=-(2**63),
        high=2**64 - 1,
        is_extension=False,
        is_random=True,
    )
    repetition_penalty: float | None = _asked(
        "Divides the positive and multiplies the negative logits of tokens in prompt or output (Keskar et al. 2019);"
        " 1: off.",
        is_low_open=True,
    )
    presence_penalty: float | None = _asked(
        "Subtracted once from the logit of each token in the output.", low=-2, high=2, is_extension=False
    )
    frequency_penalty: float | None = _asked(
        "Subtracted from a token's logit as many times as the token is in the output.",
        low=-2,
        high=2,
        is_extension=False,
    )
    no_repeat_ngram_size: int | None = _asked(
        "No sequence of so many tokens occurs twice in prompt and output; 0: off.", is_integer=True, high=MAX_INT
    )
    min_tokens: int | None = _asked(
        "No end of sequence and no stop token before this many tokens are out.", is_integer=True, high=MAX_INT
    )


KNOBS: Final[dict[str, Knob]] = {f.name: f.metadata["knob"] for f in dataclasses.fields(SamplingKnobs)}


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How one sequence is sampled, fully resolved: no None means "default", text is already token ids.

    Order: bias and banned words, penalties, temperature, min_p, top_k, top_p; `temperature == 0` is greedy, and every
    default switches its field off. The seed and the position alone determine the random number of each token, so a
    replay continues with the same tokens. `stop_token_ids` end the sequence once `min_tokens` are out; end-of-sequence
    ids are among them unless `ignore_eos` was asked for. Stop strings are not here: the owner of the detokenizer
    watches for them.

    Args:
        bad_words: Token sequences that are never completed in the output.
        logit_bias: Added to the logits: (token id, bias) pairs.
        embedding_bias: Added to the logits: packed little-endian float32 [V], or empty.
        num_logprobs: How many of the likeliest tokens are reported with each output token, beside the sampled one;
            None: no log-probabilities. They are the model's own: before bias, penalties and temperature.
        num_prompt_logprobs: The same for the prompt's tokens.
        wants_context_logits: Report the logits at every prompt token.
        wants_generation_logits: Report the logits that each output token was sampled from, as the model gave them.
        wants_embedding: Report the model's last hidden state at the prompt's last token.
        logits_processors: Names of callables that the executor holds; each edits this request's logits first.
        uses_batched_processor: The executor's batched processor edits this request's logits too.
        guide: The grammar that the output follows. It counts the replayed tokens too.
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
    top_p_reset_ids: int = -1
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    wants_context_logits: bool = False
    wants_generation_logits: bool = False
    wants_embedding: bool = False
    logits_processors: tuple[str, ...] = ()
    uses_batched_processor: bool = False
    guide: Guide | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def wants_extras(self) -> bool:
        """More than its id is reported with each output token."""
        return self.num_logprobs is not None or self.wants_generation_logits

    @property
    def needs_prompt_rows(self) -> bool:
        """The prompt must be computed from its first token where it is answered: no cached KV, no KV from elsewhere."""
        return self.num_prompt_logprobs is not None or self.wants_context_logits

    def to_wire(self) -> dict[str, Any]:
        """What differs from the defaults."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if name not in SPEC_OFF or value != SPEC_OFF[name]}
        if self.guide is not None:
            values["guide"] = self.guide.to_wire()
        return values

    @classmethod
    def from_wire(cls, fields: Any) -> SamplingSpec:
        values = {}
        for name, value in checked(fields, "sampling", dict).items():
            if (read := _READERS.get(name)) is None:
                raise WireError(f"unknown sampling field {str(name)[:64]!r}")
            values[name] = read(value, name)
        if "max_tokens" not in values:
            raise WireError("sampling fields without max_tokens")
        return cls(**values)


SPEC_OFF: Final[dict[str, Any]] = {
    f.name: f.default for f in dataclasses.fields(SamplingSpec) if f.default is not dataclasses.MISSING
}
"""The value that switches each field off."""


def _bias(value: Any, name: str) -> tuple[int, float]:
    if len(checked(value, name, list, tuple)) != 2:
        raise WireError(f"{name} is not made of pairs")
    return as_int(value[0], name), as_number(value[1], name)


_READERS: Final[dict[str, Callable[[Any, str], Any]]] = {
    **{name: knob.read for name, knob in KNOBS.items()},
    "max_tokens": as_int,
    "stop_token_ids": tuple_of(as_int),
    "bad_words": tuple_of(tuple_of(as_int)),
    "logit_bias": tuple_of(_bias),
    "embedding_bias": as_bytes,
    "num_logprobs": as_int_or_none,
    "num_prompt_logprobs": as_int_or_none,
    "wants_context_logits": as_flag,
    "wants_generation_logits": as_flag,
    "wants_embedding": as_flag,
    "logits_processors": tuple_of(lambda value, name: checked(value, name, str)),
    "uses_batched_processor": as_flag,
    "guide": guide_or_none,
}
