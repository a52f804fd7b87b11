"""The OpenAI shapes: request bodies of /v1/completions and /v1/chat/completions, and what their fields mean.

A field is honoured, or it is refused with a 400 that names it; none is ignored in silence. Valid OpenAI fields that are
not built yet are accepted at the value that means "off", and fields that change nothing in an answer as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.disaggregated import DisaggregatedParams
from tensorweave.router.sampling import SamplingFields, check_stop_strings

ROLES: Final = ("system", "developer", "user", "assistant")
DEFAULT_COMPLETION_TOKENS: Final = 16

# Change nothing in an answer.
_HARMLESS: Final = frozenset({"metadata", "safety_identifier", "prompt_cache_retention", "parallel_tool_calls"})

# Not built yet: accepted only at a value that asks for nothing. None always does.
_OFF: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "lora_request": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Usage so far on every chunk.")
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are never padded.")


class _Request(_Strict):
    """The fields that both bodies share."""

    model: str
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = None
    stop: Any = Field(None, description="A string or a list of strings.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None

    top_k: int | None = Field(None, description="Extension. 0 or -1: off.")
    min_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    min_tokens: int | None = Field(None, description="Extension. No stop before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Extension. Go on past the model's end of sequence.")
    stop_token_ids: list[int] | None = Field(None, description="Extension.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension.")
    skip_special_tokens: bool | None = Field(None, description="Extension. Default true.")
    spaces_between_special_tokens: bool | None = Field(None, description="Extension. Default true.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, description="Extension. Keep the last so many prompt tokens."
    )
    add_special_tokens: bool | None = Field(
        None, description="Extension. Default: true for completions, false for chats."
    )
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Extension. Share cached prompts only under one salt."
    )
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1, description="Extension. Higher goes first.")
    timeout_s: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = Field(
        None, description="Extension. The request's deadline."
    )
    user: Any = Field(None, description="Requests of one user go to one gang where that costs nothing.")
    prompt_cache_key: Any = Field(None, description="As `user`, and before it.")
    disaggregated_params: DisaggregatedParams | None = Field(None, description="Extension. One phase sent by hand.")

    @property
    def session(self) -> str | None:
        return next((key for key in (self.prompt_cache_key, self.user) if isinstance(key, str) and key), None)

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        if stop is not None:
            check_stop_strings([stop] if isinstance(stop, str) else stop)
        return stop

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_running_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self, *, max_tokens: int | None) -> SamplingFields:
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
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Any = Field(
        description="A string, a list of strings, a list of token ids, or a list of lists of token ids."
    )

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or _is_token_list(prompt):
            return prompt
        if (
            isinstance(prompt, list)
            and prompt
            and (all(isinstance(p, str) for p in prompt) or all(map(_is_token_list, prompt)))
        ):
            return prompt
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of lists of token ids, none empty"
        )

    @property
    def prompts(self) -> list[str | list[int]]:
        return (
            list(self.prompt)
            if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
            else [self.prompt]
        )


class ChatMessage(BaseModel):
    """One message. Keys beyond these are those that OpenAI's own answers carry, at null or empty."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = Field(None, description="A string, or a list of parts of type 'text'.")
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates know no 'developer': it is OpenAI's newer name for 'system'."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = Field(None, description="Extension. Default true.")
    prompt_token_ids: list[int] | None = Field(
        None, min_length=1, description="Extension. In place of what the messages would be rendered to."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension. Passed to the chat template.")

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        for index, message in enumerate(messages):
            _check_message(index, message)
        return messages


def _check_message(index: int, message: ChatMessage) -> None:
    param = f"messages[{index}]"
    for key, value in (message.model_extra or {}).items():
        if value not in (None, [], {}):
            raise RequestRejected(f"{param}.{key} is not supported", param=f"{param}.{key}")
    content = message.content
    if content is None and message.role != "assistant":
        raise RequestRejected(f"{param}.content is missing", param=f"{param}.content")
    if not isinstance(content, str | list | None):
        raise RequestRejected(f"{param}.content must be a string or a list of parts", param=f"{param}.content")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestRejected(f"{param}.content has a part without a type", param=f"{param}.content")
        if part["type"] != "text":
            raise RequestRejected(
                f"{param}.content has a part of type {part['type'][:32]!r}; only 'text' is supported",
                param=f"{param}.content",
            )
        if not isinstance(part.get("text"), str):
            raise RequestRejected(f"{param}.content has a part whose text is not a string", param=f"{param}.content")


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


RequestT = TypeVar("RequestT", bound=_Request)


def parse_request(model: type[RequestT], body: bytes) -> RequestT:
    """The body as a checked request. Raises RequestRejected that names the first wrong field."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestRejected(f"the body is not valid JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(fields, dict):
        raise RequestRejected("the body must be a JSON object")
    try:
        request = model.model_validate(_known_fields(model, fields))
    except ValidationError as error:
        raise _rejection(error) from None
    if request.stream_options is not None and not request.stream:
        raise RequestRejected("stream_options is only allowed with stream: true", param="stream_options")
    return request


def _known_fields(model: type[_Request], fields: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, value in fields.items():
        if name in model.model_fields:
            known[name] = value
        elif name in _OFF:
            if value is not None and not _is_off(value, _OFF[name]):
                raise RequestRejected(f"{name} is not supported yet, except at its default", param=name)
        elif name not in _HARMLESS:
            near = difflib.get_close_matches(name, [*model.model_fields, *_OFF], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestRejected(f"unknown field {name[:64]!r}{hint}", param=name[:64])
    return known


def _is_off(value: Any, accepted: Sequence[Any]) -> bool:
    """JSON equality: false is not 0."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in accepted)


def _rejection(error: ValidationError) -> RequestRejected:
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestRejected):
        return cause
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = str(cause) if cause is not None else first["msg"][0].lower() + first["msg"][1:]
    return RequestRejected(f"{param}: {message}", param=param)
