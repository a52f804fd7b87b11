"""`GenerateBody`: what the OpenAI request bodies of completions and chats have in common.

Names are OpenAI's, vLLM's and TensorRT-LLM's; what is an extension of OpenAI's API says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

from pydantic import Field, create_model, field_validator, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.sampling_spec import KNOBS
from tensorweave.router.openai.disaggregated import DisaggregatedParams
from tensorweave.router.openai.field_types import (
    TOKEN_ID,
    AtLeast1,
    Bias,
    Integer,
    NumLogprobs,
    NumSequences,
    Positive,
    Priority,
    Seed,
    Stop,
    TokenIds,
    TokenKey,
    knob_fields,
)
from tensorweave.router.openai.guided_fields import GuidedFields
from tensorweave.router.openai.not_built import IN_BOTH, NotBuilt
from tensorweave.router.openai.parsing import Strict
from tensorweave.router.sampling.checks import check_stop_strings
from tensorweave.router.sampling.fields import SamplingFields
from tensorweave.router.text.choices import Telling

_MAX_SESSION_CHARS: Final = 256


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="Extension. With `include_usage`: usage so far on every chunk."
    )
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are never padded.")


# The knobs are fields by definition, not by declaration; a type checker sees the body without them.
if TYPE_CHECKING:
    KnobFields = GuidedFields
else:
    KnobFields = create_model("KnobFields", __base__=GuidedFields, **knob_fields())


class GenerateBody(KnobFields):
    """The fields that both bodies share, beside the knobs of `cluster.sampling_spec`."""

    OFF: ClassVar[NotBuilt] = IN_BOTH
    DEFAULT_MAX_TOKENS: ClassVar[int | None] = None

    model: str
    max_tokens: Integer | None = Field(
        None, description="At most so many tokens, and no more than the context has room for."
    )
    n: NumSequences | None = None
    seed: Seed | None = None
    stop: Stop = Field(None, description="A string or a list of strings.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[TokenKey, Bias] | None = Field(
        None, max_length=1024, description="Added to the logits, by token id."
    )

    bad_words: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, max_length=256, description="Extension. Never generated, at a word's beginning or within one."
    )
    ignore_eos: bool | None = Field(None, description="Extension. Go on after the model's end of sequence.")
    stop_token_ids: TokenIds | None = Field(None, description="Extension.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension.")
    prompt_logprobs: NumLogprobs | None = Field(
        None,
        description="Extension. Log-probabilities of prompt tokens, and of so many of the likeliest. Not streamed.",
    )
    return_token_ids: bool | None = Field(None, description="Extension. Token ids of prompt and answer.")
    skip_special_tokens: bool | None = Field(None, description="Extension. Default true.")
    spaces_between_special_tokens: bool | None = Field(None, description="Extension. Default true.")
    truncate_prompt_tokens: AtLeast1 | None = Field(None, description="Extension. Keep the last so many prompt tokens.")
    add_special_tokens: bool | None = Field(
        None, description="Extension. Default: true for completions, false for chats."
    )
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Extension. Share cached prompts only under one salt."
    )
    priority: Priority | None = Field(None, description="Extension. Higher goes first.")
    timeout_s: Positive | None = Field(None, description="Extension. The request's deadline.")
    user: Any = Field(None, description="Requests of one user go to one gang where that costs nothing.")
    prompt_cache_key: Any = Field(None, description="As `user`, which it overrides.")
    disaggregated_params: DisaggregatedParams | None = Field(None, description="Extension. One phase sent by hand.")

    def check_may_end(self, param: str) -> None:
        """Raises RequestRejected if a request with a guide, by its field `param`, asks to go on behind the end."""
        if self.ignore_eos:
            raise RequestRejected(
                f"ignore_eos and {param} exclude each other: a guide says where to end", param="ignore_eos"
            )

    @property
    def session(self) -> str | None:
        return next((key for key in (self.prompt_cache_key, self.user) if isinstance(key, str) and key), None)

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_running_usage(self) -> bool:
        """As in vLLM, only if usage is asked for at all."""
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_sequences(self) -> int:
        """How many are generated for one prompt; the answer has `n` of them."""
        return self.n or 1

    def without_bulk(self) -> Self:
        """A copy without what may be as large as a body: prompts and bad words, which are known as tokens by then, what
        the guide was made from, and fields that change nothing. It is still valid, and `session` still tells sessions
        apart."""
        session = self.session
        if session is not None and len(session) > _MAX_SESSION_CHARS:
            session = blake2b(session.encode(), digest_size=16).hexdigest()
        unread = dict.fromkeys((*GuidedFields.model_fields, "bad_words", "user"))
        return self.model_copy(update={**unread, "prompt_cache_key": session})

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        if stop is not None:
            check_stop_strings([stop] if isinstance(stop, str) else stop)
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not TOKEN_ID.fullmatch(key):
                raise RequestRejected(f"logit_bias has {key[:32]!r}, which is no token id", param="logit_bias")
        return bias

    @model_validator(mode="after")
    def _check_stream(self) -> GenerateBody:
        if self.stream_options is not None and not self.stream:
            raise RequestRejected("stream_options is only allowed with stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestRejected("prompt_logprobs are not streamed", param="prompt_logprobs")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens that the client wants."""
        return self.max_tokens

    @property
    def field_names(self) -> Mapping[str, str]:
        """This body's names for fields that `SamplingFields` calls by another one."""
        return {"bad_token_ids": "bad_words"}

    def sampling(self, telling: Telling, bad_token_ids: Sequence[Sequence[int]]) -> SamplingFields:
        knobs = {name: getattr(self, name) for name in KNOBS}
        return SamplingFields(
            **knobs,
            max_tokens=self.asked_tokens if telling.has_output else 1,
            stop=self.stop_strings,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            bad_token_ids=bad_token_ids,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            logprobs=telling.num_output_logprobs,
            prompt_logprobs=telling.num_computed_prompt_logprobs,
        )
