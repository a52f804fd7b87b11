"""How a chat's answer is formed: the guide that it follows and the parser of its text, from the request's fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.chat.parsed_choice import PLAIN_TEXT, Parser
from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.text.tokens import Tokenizer

_TAIL_TOKENS: Final = 64
"""More than templates write after the beginning of an assistant's turn."""
_LONG_TAIL_TOKENS: Final = 8192
"""Where the turn has the beginning of the answer too."""


def chat_format(tokenizer: Tokenizer, settings: ChatSettings) -> ChatFormat:
    """The format of the model's answers. Raises ValueError for a parser's name that is unknown."""
    return _chosen(_template_text(tokenizer.chat_template), settings.tool_parser, settings.reasoning_parser)


@functools.lru_cache(maxsize=16)
def _chosen(template: str, tool_parser: str | None, reasoning_parser: str | None) -> ChatFormat:
    return choose_format(template, tool_parser=tool_parser, reasoning_parser=reasoning_parser)


def _template_text(template: str | Mapping[str, str] | None) -> str:
    """A tokenizer may have several templates, by name."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""


def chat_guide(
    form: ChatFormat,
    request: ChatCompletionRequest,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    answer_guide: Guide | None,
) -> Guide | None:
    """The guide of the whole answer. `answer_guide`: that of its text alone. Raises RequestRejected."""
    use = request.tool_use
    if not use.tools and answer_guide is None and request.thinking_token_budget is None:
        return None
    if request.thinking_token_budget is not None and form.thinking is None:
        raise RequestRejected(
            "thinking_token_budget: this model has no known form of reasoning (see reasoning_parser)",
            param="thinking_token_budget",
        )
    try:
        return form.guide(
            use.functions(),
            use.choice,
            is_parallel=use.is_parallel,
            prompt_tail=_prompt_tail(request, prompt, tokenizer),
            answer_guide=answer_guide,
            max_thinking_tokens=request.thinking_token_budget,
        )
    except RequestRejected as error:
        if not (use.is_legacy and error.param == "tools"):
            raise
        raise RequestRejected(error.message, param="functions") from None


def chat_parser(
    form: ChatFormat, request: ChatCompletionRequest, prompt: Sequence[int], tokenizer: Tokenizer
) -> Parser:
    """A parser for one answer."""
    form = parsed_form(form, request)
    if form.thinking is None and not request.tool_use.tools:
        return PLAIN_TEXT
    use = request.tool_use
    return form.parser(_prompt_tail(request, prompt, tokenizer), use.functions(), use.choice)


def shown_ids(form: ChatFormat, request: ChatCompletionRequest, tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens that the parser must see."""
    form = parsed_form(form, request)
    return tokenizer.special_ids_in(form.markers) if form.thinking or request.tool_use.tools else frozenset()


def parsed_form(form: ChatFormat, request: ChatCompletionRequest) -> ChatFormat:
    """What is parsed of the answer."""
    return dataclasses.replace(form, thinking=None) if request.separate_reasoning is False else form


def _prompt_tail(request: ChatCompletionRequest, prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    is_long = request.continue_final_message or request.prompt_token_ids is not None
    num_tokens = _LONG_TAIL_TOKENS if is_long else _TAIL_TOKENS
    return tokenizer.decode(prompt[-num_tokens:], skip_special_tokens=False)
