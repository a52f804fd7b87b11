"""What the guide of an answer is made of: calls of tools, an answer in a given form, or free text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.chat_formats.parser import CallSyntax
from tensorweave.router.chat_formats.structural_tags import TagFormat, any_text, json_text, matching, one_of, sequence
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice

_ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class WantedAnswer:
    """What may follow the reasoning.

    Args:
        schemas: Of the arguments of the functions that may be called, by name.
        must_call: The answer is a call and nothing else.
        is_parallel: It may have several.
        form: Of an answer that is no call; None: free text.
        is_free: Nothing has to be enforced.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    must_call: bool
    is_parallel: bool
    form: TagFormat | None
    is_free: bool

    def tag(self, syntax: CallSyntax | None, excludes: Sequence[str]) -> TagFormat:
        """As a part of a guide, calls in this syntax. `excludes`: what free text may not contain, because it would
        begin another reasoning."""
        if not self.schemas or syntax is None:
            return self.form or any_text(excludes=excludes)
        required = syntax.required(self.schemas, is_parallel=self.is_parallel)
        if self.must_call:
            return required
        if self.form is not None:
            return one_of(required, self.form)
        return syntax.possible(self.schemas, is_parallel=self.is_parallel, excludes=excludes)


def wanted_answer(
    tools: Sequence[FunctionTool], choice: ToolChoice, *, is_parallel: bool, answer_guide: Guide | None
) -> WantedAnswer:
    allowed = [tool for tool in tools if choice.allows(tool)]
    must_call = choice.must_call and bool(allowed)
    follows_schema = must_call or answer_guide is not None
    is_free = len(allowed) == len(tools) and is_parallel and not any(tool.is_strict for tool in allowed)
    return WantedAnswer(
        schemas={tool.name: _schema(tool, follows_schema) for tool in allowed},
        must_call=must_call,
        is_parallel=is_parallel and choice.mode != "named",
        form=None if answer_guide is None else guide_tag(answer_guide),
        is_free=not follows_schema and (not allowed or is_free),
    )


def _schema(tool: FunctionTool, follows_schema: bool) -> Mapping[str, Any]:
    """A model that calls freely is held to the schemas of strict functions only."""
    if tool.parameters is None or not (tool.is_strict or follows_schema):
        return _ANY_ARGUMENTS
    return {**_ANY_ARGUMENTS, **tool.parameters}


def guide_tag(guide: Guide) -> TagFormat:
    """A guide as a part of a structural tag. Raises RequestRejected for one that xgrammar does not compile."""
    if guide.backend != "xgrammar":
        raise RequestRejected(
            "this response_format needs llguidance, which cannot combine it with tools or reasoning",
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


def structural_guide(*parts: TagFormat | None) -> Guide:
    """The guide of an answer that consists of these parts."""
    whole = sequence(*[part for part in parts if part is not None])
    return Guide("structural_tag", json.dumps({"type": "structural_tag", "format": whole}))
