"""The format of a model's chats, and the parser of an answer's text, from the request's fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.chat.parsed_choice import PLAIN_TEXT, Parser
from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.chat_formats.families import HERMES
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.text.tokens import Tokenizer

_TAIL_TOKENS: Final = 64
"""More than templates write after the beginning of an assistant's turn."""
_LONG_TAIL_TOKENS: Final = 8192
"""Where the turn has the beginning of the answer too."""


def chat_format(tokenizer: Tokenizer, settings: ChatSettings) -> ChatFormat:
    """The format of the model's answers. Raises ValueError for a parser's name that is unknown.

    Where the chat template leaves tools out and no format of calls is named, they are written in Hermes' form
    (`router/text/tools_as_text.py`).
    """
    form = _chosen(_template_text(tokenizer.chat_template), settings.tool_parser, settings.reasoning_parser)
    if settings.tool_parser is None and not form.calls and form.channels is None and tokenizer.leaves_tools_out:
        return dataclasses.replace(HERMES, thinking=form.thinking)
    return form


def has_tools_as_text(form: ChatFormat, tokenizer: Tokenizer) -> bool:
    """Whether a conversation's tools are text of its messages, which has Hermes' form and no other."""
    return tokenizer.leaves_tools_out and form.name == HERMES.name


@functools.lru_cache(maxsize=16)
def _chosen(template: str, tool_parser: str | None, reasoning_parser: str | None) -> ChatFormat:
    return choose_format(template, tool_parser=tool_parser, reasoning_parser=reasoning_parser)


def _template_text(template: str | Mapping[str, str] | None) -> str:
    """A tokenizer may have several templates, by name."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""


def check_form(form: ChatFormat, request: ChatCompletionRequest) -> None:
    """Raises RequestRejected for what the model's format cannot do."""
    if request.separate_reasoning is False and form.channels is not None:
        raise RequestRejected(
            "separate_reasoning: this model's reasoning has a channel of its own, which is no part of the content",
            param="separate_reasoning",
        )


def chat_parser(
    form: ChatFormat, request: ChatCompletionRequest, prompt: Sequence[int], tokenizer: Tokenizer
) -> Parser:
    """A parser for one answer."""
    form = parsed_form(form, request)
    if not form.has_reasoning and not request.tool_use.tools:
        return PLAIN_TEXT
    use = request.tool_use
    return form.parser(
        prompt_tail(request, prompt, tokenizer), use.functions(), use.choice, is_parallel=use.is_parallel
    )


def shown_ids(form: ChatFormat, request: ChatCompletionRequest, tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens that the parser must see."""
    form = parsed_form(form, request)
    return tokenizer.special_ids_in(form.markers) if form.has_reasoning or request.tool_use.tools else frozenset()


def parsed_form(form: ChatFormat, request: ChatCompletionRequest) -> ChatFormat:
    """What is parsed of the answer."""
    return dataclasses.replace(form, thinking=None) if request.separate_reasoning is False else form


def prompt_tail(request: ChatCompletionRequest, prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """The end of the prompt's text, with all that it has of the assistant's turn."""
    is_long = request.continue_final_message or request.prompt_token_ids is not None
    num_tokens = _LONG_TAIL_TOKENS if is_long else _TAIL_TOKENS
    return tokenizer.decode(prompt[-num_tokens:], skip_special_tokens=False)
