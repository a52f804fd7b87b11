"""The OpenAI request bodies of /v1/completions and /v1/chat/completions, and what their fields ask for.

Names are OpenAI's, vLLM's and TensorRT-LLM's; what is an extension of OpenAI's API says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import Field, field_validator, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.openai.disaggregated import DisaggregatedParams
from tensorweave.router.openai.field_types import (
    TOKEN_ID,
    AtLeast0,
    AtLeast1,
    Bias,
    Integer,
    Integers,
    NumLogprobs,
    NumSequences,
    Penalty,
    Positive,
    Priority,
    Probability,
    Prompt,
    Seed,
    Stop,
    TokenIds,
    TokenKey,
    TopK,
    whole_items,
)
from tensorweave.router.openai.messages import ChatMessage, check_messages
from tensorweave.router.openai.not_built import IN_BOTH, IN_CHATS, IN_COMPLETIONS, NotBuilt
from tensorweave.router.openai.parsing import Strict
from tensorweave.router.openai.service_fields import NO_CHANGE, ServiceFields, ServiceName
from tensorweave.router.sampling.sampling import SamplingFields, check_stop_strings
from tensorweave.router.text.choices import Telling

DEFAULT_COMPLETION_TOKENS: Final = 16
_MAX_SESSION_CHARS: Final = 256
_EMPTY_MESSAGE: Final = ChatMessage(role="user", content="")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="Extension. With `include_usage`: usage so far on every chunk."
    )
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are never padded.")


class GenerateBody(ServiceFields):
    """The fields that both bodies share."""

    OFF: ClassVar[NotBuilt] = IN_BOTH

    model: str
    max_tokens: Integer | None = Field(
        None, description="At most so many tokens, and no more than the context has room for."
    )
    n: NumSequences | None = None
    seed: Seed | None = None
    stop: Stop = Field(None, description="A string or a list of strings.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenKey, Bias] | None = Field(
        None, max_length=1024, description="Added to the logits, by token id."
    )

    top_k: TopK | None = Field(None, description="Extension. 0 or -1: off.")
    min_p: Probability | None = Field(None, description="Extension. Least part of the likeliest token's probability.")
    repetition_penalty: Positive | None = Field(None, description="Extension. 1: off.")
    no_repeat_ngram_size: AtLeast0 | None = Field(None, description="Extension. 0: off.")
    bad_words: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, max_length=256, description="Extension. Never generated, at a word's beginning or within one."
    )
    top_p_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Extension. Per token.")
    top_p_min: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Extension. The least top_p.")
    top_p_reset_ids: AtLeast0 | None = Field(None, description="Extension. After this token, top_p begins anew.")
    min_tokens: AtLeast0 | None = Field(None, description="Extension. No stop before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Extension. Go on past the model's end of sequence.")
    stop_token_ids: TokenIds | None = Field(None, description="Extension.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension.")
    prompt_logprobs: NumLogprobs | None = Field(
        None, description="Extension. Log-probabilities of the prompt's tokens, and of so many likeliest. Not streamed."
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
    prompt_cache_key: Any = Field(None, description="As `user`, and before it.")
    disaggregated_params: DisaggregatedParams | None = Field(None, description="Extension. One phase sent by hand.")

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
        """As vLLM has it, only where usage is asked for at all."""
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_sequences(self) -> int:
        """Of one prompt, those that are generated; `n` of them are told."""
        return self.n or 1

    def without_bulk(self) -> Self:
        """A copy in which what may be as large as a body is empty or short: prompts and bad words, which are known as
        tokens by then, and what changes nothing. It is still valid, and `session` still tells sessions apart."""
        session = self.session
        if session is not None and len(session) > _MAX_SESSION_CHARS:
            session = blake2b(session.encode(), digest_size=16).hexdigest()
        unread = dict.fromkeys((*ServiceFields.model_fields, "bad_words", "user"))
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

    def sampling(
        self, telling: Telling, *, max_tokens: int | None, bad_token_ids: Sequence[Sequence[int]]
    ) -> SamplingFields:
        return SamplingFields(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop_strings,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            bad_token_ids=bad_token_ids,
            logit_bias={int(key): value for key, value in (self.logit_bias or {}).items()},
            top_p_decay=self.top_p_decay,
            top_p_min=self.top_p_min,
            top_p_reset_id=self.top_p_reset_ids,
            logprobs=telling.num_output_logprobs,
            prompt_logprobs=telling.num_computed_prompt_logprobs,
        )


class CompletionRequest(GenerateBody):
    """POST /v1/completions."""

    OFF: ClassVar[NotBuilt] = IN_COMPLETIONS

    prompt: Prompt = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of token ids."
    )
    best_of: NumSequences | None = Field(
        None, description="Generate so many and tell the n of highest mean log-probability. Not streamed."
    )
    echo: bool | None = Field(None, description="Begin the text, and log-probabilities, with the prompt.")
    logprobs: NumLogprobs | None = Field(None, description="Tell each token's, and those of so many likeliest.")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or _is_token_list(prompt := whole_items(prompt)):
            return prompt
        if isinstance(prompt, list) and prompt:
            if all(isinstance(p, str) for p in prompt):
                return prompt
            if all(map(_is_token_list, prompts := list(map(whole_items, prompt)))):
                return prompts
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of lists of token ids, none empty"
        )

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise RequestRejected(f"best_of is {self.best_of}, less than n", param="best_of")
        if self.stream and self.num_sequences > (self.n or 1):
            raise RequestRejected("the best of several sequences cannot be streamed", param="best_of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return (
            list(self.prompt)
            if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
            else [self.prompt]
        )

    @property
    def prompt_param(self) -> str:
        return "prompt"

    def without_bulk(self) -> Self:
        return super().without_bulk().model_copy(update={"prompt": [0] if isinstance(self.prompt, list) else "-"})

    @property
    def given_token_ids(self) -> tuple[str, bool]:
        return self.prompt_param, isinstance(self.prompt, list)

    @property
    def num_sequences(self) -> int:
        return self.best_of or self.n or 1

    @property
    def telling(self) -> Telling:
        return Telling(
            num_logprobs=self.logprobs,
            num_prompt_logprobs=self.prompt_logprobs,
            has_token_ids=bool(self.return_token_ids),
            has_echo=bool(self.echo),
            has_output=not (self.echo and self.max_tokens == 0),
            is_ranked=self.num_sequences > (self.n or 1),
        )


class ChatCompletionRequest(GenerateBody):
    """POST /v1/chat/completions."""

    OFF: ClassVar[NotBuilt] = IN_CHATS

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: AtLeast1 | None = Field(None, description="As `max_tokens`, and before it.")
    logprobs: bool | None = Field(None, description="Tell each token's log-probability.")
    top_logprobs: NumLogprobs | None = Field(None, description="And those of so many likeliest tokens.")
    add_generation_prompt: bool | None = Field(None, description="Extension. Default true.")
    prompt_token_ids: Integers | None = Field(
        None, min_length=1, description="Extension. In place of what the messages would be rendered to."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension. Passed to the chat template.")
    parallel_tool_calls: bool | None = Field(None, description=NO_CHANGE)
    prediction: dict[str, Any] | None = Field(None, description=NO_CHANGE)
    reasoning_effort: ServiceName | None = Field(None, description=NO_CHANGE)
    verbosity: ServiceName | None = Field(None, description=NO_CHANGE)

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        return check_messages(messages)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestRejected("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def prompt_param(self) -> str:
        return "messages" if self.prompt_token_ids is None else "prompt_token_ids"

    def without_bulk(self) -> Self:
        token_ids = None if self.prompt_token_ids is None else [0]
        short = {
            "messages": [_EMPTY_MESSAGE],
            "prompt_token_ids": token_ids,
            "chat_template_kwargs": None,
            "prediction": None,
        }
        return super().without_bulk().model_copy(update=short)

    @property
    def given_token_ids(self) -> tuple[str, bool]:
        return "prompt_token_ids", self.prompt_token_ids is not None

    @property
    def telling(self) -> Telling:
        return Telling(
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            num_prompt_logprobs=self.prompt_logprobs,
            has_token_ids=bool(self.return_token_ids),
        )


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
