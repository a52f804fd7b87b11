"""xgrammar's structural tags: text with tags, and between them JSON of a schema; `chat_formats` and clients write them.

Every schema and expression in a tag goes through the same checks as one alone. Tags are xgrammar's own form, so
keywords that only llguidance enforces are refused in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from tensorweave.router.guided import expressions, pattern
from tensorweave.router.guided.document import depth_of, step
from tensorweave.router.guided.expressions import PatternError
from tensorweave.router.guided.families import check_pattern_size
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.refusal import Refusal

_FIELDS: Final[dict[str, frozenset[str]]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "any_text": "excludes max_tokens max_chars",
        "any_tokens": "exclude_tokens max_tokens",
        "const_string": "value",
        "dispatch": "rules loop excludes",
        "exclude_token": "exclude_tokens",
        "grammar": "grammar",
        "json_schema": "json_schema style any_order max_whitespace_cnt excludes",
        "optional": "content",
        "or": "elements",
        "plus": "content",
        "qwen_xml_parameter": "json_schema",
        "regex": "pattern",
        "repeat": "min max content",
        "sequence": "elements",
        "star": "content",
        "tag": "begin content end",
        "tags_with_separator": "tags separator at_least_one stop_after_first",
        "token": "token",
        "token_dispatch": "rules loop exclude_tokens",
        "token_triggered_tags": "trigger_tokens tags exclude_tokens at_least_one stop_after_first",
        "triggered_tags": "triggers tags at_least_one stop_after_first excludes",
    }.items()
}
"""The fields of each kind of format, beside `type`. xgrammar ignores unknown ones."""


class SchemaWriter(Protocol):
    """A schema as a client wrote it, to fields of a format that xgrammar enforces. Raises Refusal."""

    def __call__(self, schema: Any, *, is_json: bool) -> dict[str, Any]: ...


def write_structural_tag(data: Any, limits: GuidedLimits, max_whitespace: int, write: SchemaWriter) -> str:
    """The tag as JSON text, its schemas in the form of `write.py`. Raises Refusal."""
    if not isinstance(data, dict):
        raise Refusal(None, "", "a structural tag must be an object")
    if (depth := depth_of(data)) > 2 * limits.max_depth:
        raise Refusal(
            None, "", f"the structural tag is nested {depth} levels deep; the limit is {2 * limits.max_depth}"
        )
    form, at = (data["format"], "/format") if "format" in data else (_from_structures(data), "")
    if unknown := data.keys() - {"type", "format", "structures", "triggers"}:
        raise Refusal(min(unknown)[:64], "", "is no field of a structural tag")
    written = _FormatWriter(limits, max_whitespace, write).format(form, at)
    return orjson.dumps({"type": "structural_tag", "format": written}).decode()


def _from_structures(data: dict[str, Any]) -> dict[str, Any]:
    """The older form: `structures` of begin, schema and end, and their `triggers`."""
    structures, triggers = data.get("structures"), data.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise Refusal(None, "", "a structural tag has a format, or structures and triggers")
    tags = []
    for i, item in enumerate(structures):
        if not isinstance(item, dict) or item.keys() != {"begin", "schema", "end"}:
            raise Refusal("structures", f"/structures/{i}", "must have begin, schema and end")
        content = {"type": "json_schema", "json_schema": item["schema"]}
        tags.append({"type": "tag", "begin": item["begin"], "content": content, "end": item["end"]})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


@dataclass(frozen=True, slots=True)
class _FormatWriter:
    limits: GuidedLimits
    max_whitespace: int
    write: SchemaWriter

    def format(self, form: Any, at: str) -> dict[str, Any]:
        if not isinstance(form, dict):
            raise Refusal(None, at, "a format must be an object")
        if not isinstance(kind := form.get("type"), str) or kind not in _FIELDS:
            raise Refusal("type", at, f"is {str(kind)[:64]!r}, which is no kind of format")
        if unknown := form.keys() - _FIELDS[kind] - {"type"}:
            raise Refusal(min(unknown)[:64], at, f"is no field of a {kind}")
        written = dict(form)
        for name in ("elements", "tags"):
            if name in form:
                written[name] = [self.format(f, step(at, name, i)) for i, f in enumerate(_as_list(form, name, at))]
        if "content" in form:
            written["content"] = self.format(form["content"], step(at, "content"))
        if "rules" in form:
            written["rules"] = [self._rule(r, step(at, "rules", i)) for i, r in enumerate(_as_list(form, "rules", at))]
        if "json_schema" in form:
            fields = self._json_schema(form, at)
            written = fields if "grammar" in fields else written | fields
        if "pattern" in form:
            written["pattern"] = self._pattern(form["pattern"], at)
        return written

    def _rule(self, rule: Any, at: str) -> list[Any]:
        if not isinstance(rule, list) or len(rule) != 2:
            raise Refusal("rules", at, "must be pairs of a text and a format")
        return [rule[0], self.format(rule[1], step(at, 1))]

    def _json_schema(self, form: dict[str, Any], at: str) -> dict[str, Any]:
        if form.get("any_order"):
            raise Refusal("any_order", at, "enforces neither required nor unique properties")
        is_json = form["type"] == "json_schema" and form.get("style", "json") == "json" and not form.get("excludes")
        try:
            fields = self.write(form["json_schema"], is_json=is_json)
        except Refusal as refusal:
            raise Refusal(refusal.keyword, step(at, "json_schema") + refusal.pointer, refusal.reason) from None
        if form["type"] == "qwen_xml_parameter" or "grammar" in fields:
            return fields
        most = form.get("max_whitespace_cnt")
        is_bound = isinstance(most, int) and not isinstance(most, bool) and 0 < most < self.max_whitespace
        return {**fields, "max_whitespace_cnt": most if is_bound else max(1, self.max_whitespace)}

    def _pattern(self, text: Any, at: str) -> str:
        try:
            parsed = pattern.parse_match(text if isinstance(text, str) else "(")
            check_pattern_size(parsed, self.limits.max_pattern_size)
        except PatternError as error:
            raise Refusal("pattern", at, f"cannot be enforced: {error}") from None
        return expressions.write(parsed)


def _as_list(form: dict[str, Any], name: str, at: str) -> list[Any]:
    value = form[name]
    if not isinstance(value, list):
        raise Refusal(name, at, "must be a list")
    return value
