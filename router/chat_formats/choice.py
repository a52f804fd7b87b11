"""Chooses the format of a model: by the names that an operator gives, or by the chat template."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Final

from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.families import PLAIN, REASONING_PARSERS, TEMPLATE_MARKS, TOOL_PARSERS

NONE: Final = "none"
"""As the name of a parser: nothing is recognized, whatever the chat template says."""


def choose_format(
    chat_template: str | None, *, tool_parser: str | None = None, reasoning_parser: str | None = None
) -> ChatFormat:
    """The format of a model's answers.

    Args:
        chat_template: Of its tokenizer.
        tool_parser: The name of a format of calls, as vLLM, SGLang or TensorRT-LLM have it; `none`; None: the chat
            template tells.
        reasoning_parser: The same for reasoning.

    Raises:
        ValueError: An unknown name, or gpt-oss's, whose channels hold reasoning and calls, with another one.
    """
    detected = detect_format(chat_template or "")
    chosen = detected if tool_parser is None else _named(tool_parser, TOOL_PARSERS, "tool_parser")
    reasons = detected if reasoning_parser is None else _named(reasoning_parser, REASONING_PARSERS, "reasoning_parser")
    if chosen.channels or reasons.channels:
        return _with_channels(chosen, reasons, tool_parser, reasoning_parser)
    return dataclasses.replace(chosen, thinking=reasons.thinking)


def _with_channels(
    chosen: ChatFormat, reasons: ChatFormat, tool_parser: str | None, reasoning_parser: str | None
) -> ChatFormat:
    if chosen.channels and (reasons.channels or reasoning_parser in (None, NONE)):
        return chosen
    if reasons.channels and tool_parser is None:
        return reasons
    if reasoning_parser is None:  # the template is gpt-oss's, the operator says that the model is not
        return chosen
    raise ValueError(f"tool_parser {tool_parser!r} and reasoning_parser {reasoning_parser!r} do not go together")


def detect_format(chat_template: str) -> ChatFormat:
    """The first family whose marks are all in the template. Its reasoning counts only if the template knows it."""
    found = next(
        (family for marks, family in TEMPLATE_MARKS if all(mark in chat_template for mark in marks)),
        PLAIN,
    )
    has_thinking = found.thinking is not None and found.thinking.end in chat_template
    return found if has_thinking else dataclasses.replace(found, thinking=None)


def _named(name: str, table: Mapping[str, ChatFormat], field: str) -> ChatFormat:
    known = {NONE: PLAIN, **table}
    key = name.lower().replace("-", "_")
    if key not in known:
        nearest = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"{field}: unknown format {name!r}{hint} Known: {', '.join(sorted(known))}")
    return known[key]
