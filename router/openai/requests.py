"""The OpenAI request bodies of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

from pydantic import Field, field_validator, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.openai.field_types import AtLeast1, Integers, NumLogprobs, NumSequences, Prompt, whole_items
from tensorweave.router.openai.generate_body import GenerateBody
from tensorweave.router.openai.messages import ChatMessage, check_messages
from tensorweave.router.openai.not_built import IN_CHATS, IN_COMPLETIONS, NotBuilt
from tensorweave.router.openai.service_fields import NO_CHANGE, ServiceName
from tensorweave.router.text.choices import Telling

_EMPTY_MESSAGE: Final = ChatMessage(role="user", content="")


class CompletionRequest(GenerateBody):
    """POST /v1/completions."""

    OFF: ClassVar[NotBuilt] = IN_COMPLETIONS
    DEFAULT_MAX_TOKENS: ClassVar[int | None] = 16

    prompt: Prompt = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of token ids."
    )
    best_of: NumSequences | None = Field(
        None, description="Generate so many and return the n of highest mean log-probability. Not streamed."
    )
    echo: bool | None = Field(None, description="Begin the text, and the log-probabilities, with the prompt.")
    logprobs: NumLogprobs | None = Field(
        None, description="Log-probabilities of each token, and of so many of the likeliest."
    )

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
    max_completion_tokens: AtLeast1 | None = Field(None, description="As `max_tokens`, which it overrides.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: NumLogprobs | None = Field(None, description="Return those of so many of the likeliest tokens, too.")
    add_generation_prompt: bool | None = Field(None, description="Extension. Default true.")
    prompt_token_ids: Integers | None = Field(
        None, min_length=1, description="Extension. Instead of the rendered messages."
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
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def field_names(self) -> Mapping[str, str]:
        max_tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().field_names, "logprobs": "top_logprobs", "max_tokens": max_tokens}

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
