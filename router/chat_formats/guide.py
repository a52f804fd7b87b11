"""What the guide of an answer is made of: calls of tools, an answer in a given form, or free text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.chat_formats.parser import CallSyntax
from tensorweave.router.chat_formats.relaxed_schema import relaxed
from tensorweave.router.chat_formats.structural_tags import JsonForm, TagFormat, any_text, matching, one_of, sequence
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice, are_calls_guided
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.params import GuideParams

_ANY_OBJECT: Final = JsonForm({"type": "object"})
_NO_ARGUMENTS: Final = JsonForm({"type": "object", "properties": {}, "additionalProperties": False})
_FORM_PARAM: Final = "response_format"
_NOT_COMBINED: Final = "cannot be combined with tools or reasoning; without them it is enforced"
_MAX_SCHEMAS: Final = 8
"""Schemas of the largest size that a request's tools may have together."""


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

    schemas: Mapping[str, JsonForm]
    must_call: bool
    is_parallel: bool
    form: TagFormat | None
    is_free: bool

    def tag(self, syntax: CallSyntax | None, excludes: Sequence[str]) -> TagFormat:
        """Calls in this syntax as a part of a guide. `excludes`: what free text may not contain, because it would
        begin another reasoning."""
        if not self.schemas or syntax is None:
            return self.form or any_text(excludes=excludes)
        required = syntax.required(self.schemas, is_parallel=self.is_parallel)
        if self.must_call:
            return required
        if self.form is not None:
            return one_of(required, self.form)
        return syntax.possible(self.schemas, is_parallel=self.is_parallel, excludes=excludes)


@dataclass(frozen=True, slots=True)
class TagWriter:
    """Writes structural tags, whose schemas are within `limits`."""

    limits: GuidedLimits = field(default_factory=GuidedLimits)

    def wanted(
        self,
        tools: Sequence[FunctionTool],
        choice: ToolChoice,
        *,
        is_parallel: bool,
        answer_guide: Guide | None,
        is_flat: bool,
    ) -> WantedAnswer:
        """`is_flat`: calls have each argument for itself. Raises RequestRejected."""
        allowed = [tool for tool in tools if choice.allows(tool)]
        must_call = choice.must_call and bool(allowed)
        follows = must_call or answer_guide is not None
        return WantedAnswer(
            schemas={
                tool.name: self._schema(tool, f"tools[{place}].function.parameters", follows, is_flat)
                for place, tool in enumerate(tools)
                if choice.allows(tool)
            },
            must_call=must_call,
            is_parallel=is_parallel and choice.mode != "named",
            form=None if answer_guide is None else guide_tag(answer_guide, self.limits),
            is_free=not follows and not are_calls_guided(tools, choice, is_parallel=is_parallel),
        )

    def write(self, markers: Iterable[str], *parts: TagFormat | None) -> Guide:
        """The guide of an answer that consists of these parts. Raises RequestRejected.

        The workers let a model use only those special tokens whose text the guide has. Therefore it has `markers` in a
        field that xgrammar does not read: some of them come from its styles.
        """
        whole = sequence(*[part for part in parts if part is not None])
        tag = {"type": "structural_tag", "format": whole, "markers": sorted(markers)}
        text = json.dumps(tag, ensure_ascii=False)
        if len(text) > (limit := _MAX_SCHEMAS * self.limits.max_bytes):
            raise RequestRejected(f"the schemas of the tools have more than {limit} bytes together", param="tools")
        return Guide("structural_tag", text)

    def _schema(self, tool: FunctionTool, param: str, follows: bool, is_flat: bool) -> JsonForm:
        """A model that calls freely is held to the schemas of strict functions only. Of a function that is not strict,
        the keywords are followed that can be enforced. A function whose schema declares no properties has none."""
        if not (tool.is_strict or follows):
            return _ANY_OBJECT
        if not tool.parameters:
            return _NO_ARGUMENTS
        schema = {**tool.parameters, "type": "object"}
        if schema.get("properties") == {}:
            schema.setdefault("additionalProperties", False)
        if tool.is_strict:
            return self._enforced(schema, param, is_flat)
        for candidate in (schema, relaxed(schema)):
            with contextlib.suppress(RequestRejected):
                return self._enforced(candidate, param, is_flat)
        return _ANY_OBJECT

    def _enforced(self, schema: Mapping[str, Any], param: str, is_flat: bool) -> JsonForm:
        """Where each argument stands for itself, its schema has to stay one."""
        params = GuideParams(json=dict(schema))
        guide = guide_for(params, "xgrammar", self.limits, param=param, may_be_grammar=not is_flat)
        if guide.kind == "ebnf":
            return JsonForm(True, grammar=guide.text)
        form = JsonForm(json.loads(guide.text), guide.max_whitespace)
        if not is_flat:
            return form
        if (flat := form.flattened()) is None:
            raise RequestRejected(f"{param}: this model's calls need one object with properties", param=param)
        return flat


def guide_tag(guide: Guide, limits: GuidedLimits) -> TagFormat:
    """A guide as a part of a structural tag. Raises RequestRejected for one that xgrammar does not enforce."""
    if guide.backend != "xgrammar":
        guide = _for_xgrammar(guide, limits)
    match guide.kind:
        case "json_schema":
            return JsonForm(json.loads(guide.text), guide.max_whitespace).tag()
        case "regex":
            return matching(guide.text)
        case "ebnf":
            return {"type": "grammar", "grammar": guide.text}
        case "structural_tag":
            form: TagFormat = json.loads(guide.text)["format"]
            return form
        case kind:
            raise RequestRejected(f"a {kind} grammar {_NOT_COMBINED}", param=_FORM_PARAM)


def _for_xgrammar(guide: Guide, limits: GuidedLimits) -> Guide:
    """The same for xgrammar, where it enforces all of it: a schema with expressions, as a grammar."""
    if guide.kind == "json_schema":
        params = GuideParams(json=guide.text, max_whitespace=guide.max_whitespace)
    elif guide.kind == "regex":
        params = GuideParams(regex=guide.text)
    else:
        raise RequestRejected(f"a grammar for llguidance {_NOT_COMBINED}", param=_FORM_PARAM)
    try:
        return guide_for(params, "xgrammar", limits, param=_FORM_PARAM, may_be_grammar=True)
    except RequestRejected as error:
        raise RequestRejected(f"{error.message}: a schema for llguidance {_NOT_COMBINED}", param=_FORM_PARAM) from None
