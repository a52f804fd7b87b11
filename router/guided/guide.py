"""`guide_for`: from what a request says about its output to a `Guide`, or to a RequestRejected that says why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide, GuideBackend
from tensorweave.router.guided import pattern
from tensorweave.router.guided.document import SchemaDocument, check_size, read_document
from tensorweave.router.guided.families import check_pattern_size
from tensorweave.router.guided.features import FEATURES, features_of
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.params import GuideParams
from tensorweave.router.guided.pattern import Expression, PatternError
from tensorweave.router.guided.read import SchemaReader
from tensorweave.router.guided.refusal import Refusal
from tensorweave.router.guided.settle import SettledSchema, settle
from tensorweave.router.guided.structural_tag import write_structural_tag
from tensorweave.router.guided.write import write_schema, written_schema

_ANY_OBJECT: Final = {"type": "object"}
_BACKENDS: Final[dict[BackendChoice, tuple[GuideBackend, ...]]] = {
    "auto": ("xgrammar", "llguidance"),
    "xgrammar": ("xgrammar",),
    "llguidance": ("llguidance",),
}
"""The backends that may be used, in this order."""
_MAX_XGRAMMAR_PATTERN: Final = 1000


class _Writer:
    def __init__(self, params: GuideParams, backend: BackendChoice, limits: GuidedLimits) -> None:
        self._params = params
        self._backends = _BACKENDS[backend]
        self._limits = limits
        asked = params.max_whitespace
        self._max_whitespace = limits.max_whitespace if asked is None else min(asked, limits.max_whitespace)

    def write(self, kind: str) -> Guide:
        writers: dict[str, Callable[[], Guide]] = {
            "json": lambda: self._json(self._params.json),
            "json_object": lambda: self._json(_ANY_OBJECT),
            "regex": self._regex,
            "choice": self._choice,
            "grammar": self._grammar,
            "structural_tag": self._structural_tag,
        }
        return writers[kind]()

    def _json(self, schema: Any) -> Guide:
        settled, backend = self._settled(schema, self._backends)
        return Guide("json_schema", write_schema(settled, backend), backend, self._max_whitespace)

    def _settled(self, schema: Any, allowed: Sequence[GuideBackend]) -> tuple[SettledSchema, GuideBackend]:
        document = read_document(schema, self._limits)
        settled = read_settled(document, self._limits, closes_objects=self._params.disable_additional_properties)
        return settled, choose_backend(document, settled, allowed)

    def _regex(self) -> Guide:
        assert self._params.regex is not None
        check_size(self._params.regex, self._limits)
        if not self._params.regex:
            raise Refusal(None, "", "the regular expression is empty")
        try:
            parsed = pattern.parse_match(self._params.regex)
            check_pattern_size(parsed, self._limits.max_pattern_size)
        except PatternError as error:
            raise Refusal(None, "", f"the regular expression cannot be enforced: {error}") from None
        return Guide("regex", pattern.write(parsed), self._backends[-1 if _is_large(parsed) else 0])

    def _choice(self) -> Guide:
        choices = self._params.choice
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices or not all(choices):
            raise Refusal(None, "", "must be a list of strings, none of them empty")
        if not all(isinstance(choice, str) for choice in choices):
            raise Refusal(None, "", "must be a list of strings")
        check_size("".join(choices), self._limits)
        try:
            parsed = pattern.Choice(tuple(map(pattern.literal, dict.fromkeys(choices))))
        except PatternError as error:
            raise Refusal(None, "", str(error)) from None
        return Guide("regex", pattern.write(parsed), self._backends[0])

    def _grammar(self) -> Guide:
        assert self._params.grammar is not None
        check_size(self._params.grammar, self._limits)
        if not self._params.grammar.strip():
            raise Refusal(None, "", "the grammar is empty")
        backend = self._backends[0]
        return Guide("lark" if backend == "llguidance" else "ebnf", self._params.grammar, backend)

    def _structural_tag(self) -> Guide:
        if self._backends[0] == "llguidance":
            raise Refusal(None, "", "structural tags need the backend xgrammar; this service has llguidance")
        tag = self._params.structural_tag
        check_size(tag if isinstance(tag, str) else orjson.dumps(tag), self._limits)
        text = write_structural_tag(tag, self._limits, self._max_whitespace, self._schema_in_tag)
        return Guide("structural_tag", text, "xgrammar")

    def _schema_in_tag(self, schema: Any) -> dict[str, Any]:
        settled, backend = self._settled(schema, ("xgrammar",))
        return written_schema(settled, backend)


def guide_for(
    params: GuideParams,
    backend: BackendChoice | None = "auto",
    limits: GuidedLimits | None = None,
    *,
    param: str | None = None,
) -> Guide:
    """The guide that enforces `params`.

    Args:
        params: What the request says: exactly one of json, regex, choice, grammar, json_object, structural_tag.
        backend: The operator's choice. `auto`: xgrammar, and llguidance for what xgrammar would not enforce; None: no
            guides.
        limits: Bounds of size, depth and white space; default: `GuidedLimits()`.
        param: The request's own name for the field, for errors.

    Raises:
        RequestRejected: Nobody enforces a keyword (the message names it and its JSON pointer), or the schema,
            expression or grammar is malformed or beyond a limit.
    """
    if backend is None:
        raise RequestRejected("this service has no guided decoding (guided_decoding_backend)", param=param)
    given = params.given
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise RequestRejected(f"exactly one kind of guide must be given, not {found}", param=param)
    name = param or given[0]
    try:
        return _Writer(params, backend, limits or GuidedLimits()).write(given[0])
    except Refusal as refusal:
        raise RequestRejected(f"{name}: {refusal.message}", param=name) from None


def _is_large(expression: Expression) -> bool:
    """xgrammar takes more than 0.3 s to compile 1,000 repetitions of a class."""
    return pattern.size(expression) > _MAX_XGRAMMAR_PATTERN


def read_settled(document: SchemaDocument, limits: GuidedLimits, *, closes_objects: bool = False) -> SettledSchema:
    """Raises Refusal."""
    return settle(SchemaReader(document, limits).union_at, closes_objects=closes_objects)


def choose_backend(document: SchemaDocument, schema: SettledSchema, allowed: Sequence[GuideBackend]) -> GuideBackend:
    """The first backend that enforces all of the schema. Raises a Refusal that names what none of them enforces."""
    found = dict.fromkeys(pair for union in schema.unions() for pair in features_of(union))
    missing = {b: [pair for pair in found if b not in FEATURES[pair[0]].backends] for b in allowed}
    for backend in allowed:
        if not missing[backend]:
            return backend
    everywhere = [pair for pair in missing[allowed[0]] if all(pair in others for others in missing.values())]
    (name, at), whom = (everywhere or missing[allowed[0]])[0], "any backend" if len(allowed) > 1 else allowed[0]
    where = FEATURES[name].where
    if everywhere:
        raise Refusal(_keyword(document, name, at), at, f"{where} is not enforced by {whom}".strip())
    other, other_at = missing["llguidance"][0]
    reason = f"{where} is enforced by llguidance only, and {_keyword(document, other, other_at)!r} at {other_at!r}"
    raise Refusal(_keyword(document, name, at), at, f"{reason} {FEATURES[other].where} by xgrammar only".strip())


def _keyword(document: SchemaDocument, name: str, at: str) -> str:
    """The first of the feature's keywords that the schema has."""
    schema, keywords = document.schema_at(at, at), FEATURES[name].keywords
    return next((key for key in keywords if isinstance(schema, dict) and key in schema), keywords[0])
