"""Writes the guide of an answer: reasoning, then calls of tools, an answer in a given form, or free text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.chat_formats.parser import CallSyntax
from tensorweave.router.chat_formats.structural_tags import TagFormat, json_text, matching, one_of, sequence
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice

_ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}


def answer_tag(
    syntax: CallSyntax | None,
    tools: Sequence[FunctionTool],
    tool_choice: ToolChoice,
    *,
    is_parallel: bool,
    answer_guide: Guide | None,
    excludes: Sequence[str],
) -> TagFormat | None:
    """What may follow the reasoning; None: anything, so no guide is needed for it. `excludes`: what free text may not
    contain, because it would begin another reasoning."""
    allowed = [tool for tool in tools if tool_choice.allows(tool)]
    form = None if answer_guide is None else guide_tag(answer_guide)
    if not allowed:
        return form
    if syntax is None:
        raise RequestRejected("this model has no known format for calls; see tool_parser", param="tools")
    must_follow = tool_choice.must_call or form is not None
    calls = syntax.call_tags({tool.name: _schema(tool, must_follow) for tool in allowed})
    if tool_choice.must_call:
        return calls.required(is_parallel=is_parallel and tool_choice.mode != "named")
    if form is not None:
        return one_of(calls.required(is_parallel=is_parallel), form)
    is_free = is_parallel and len(allowed) == len(tools) and not any(tool.is_strict for tool in allowed)
    return None if is_free else calls.possible(syntax.trigger, is_parallel=is_parallel, excludes=excludes)


def _schema(tool: FunctionTool, must_follow: bool) -> Mapping[str, Any]:
    """A model that calls freely is held to the schemas of strict functions only."""
    if tool.parameters is None or not (tool.is_strict or must_follow):
        return _ANY_ARGUMENTS
    return {**_ANY_ARGUMENTS, **tool.parameters}


def guide_tag(guide: Guide) -> TagFormat:
    """A guide as a part of a structural tag. Raises RequestRejected for one that xgrammar does not compile."""
    if guide.backend != "xgrammar":
        raise RequestRejected(
            "this response format needs llguidance, which cannot combine it with tools or reasoning",
            param="response_format",
        )
    match guide.kind:
        case "json_schema":
            schema = json.loads(guide.text)
            if not isinstance(schema, dict):
                schema = {} if schema else {"not": {}}
            return json_text(schema, max_whitespace=guide.max_whitespace)
        case "regex":
            return matching(guide.text)
        case "ebnf":
            return {"type": "grammar", "grammar": guide.text}
        case "structural_tag":
            form: TagFormat = json.loads(guide.text)["format"]
            return form
        case kind:
            raise RequestRejected(
                f"a {kind} grammar cannot be combined with tools or reasoning", param="response_format"
            )


def whole_guide(thinking: TagFormat | None, answer: TagFormat) -> Guide:
    """The guide of reasoning and answer together."""
    parts = [*([thinking] if thinking else []), answer]
    return Guide("structural_tag", json.dumps({"type": "structural_tag", "format": sequence(*parts)}))
