"""`guide_for`: from what a request says about its output to a `Guide`, or to a RequestRejected that says why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import BackendChoice, Guide, GuideBackend, GuideKind
from tensorweave.router.guided import expressions, pattern
from tensorweave.router.guided.document import SchemaDocument, check_size, read_document, read_json
from tensorweave.router.guided.ebnf import write_grammar
from tensorweave.router.guided.expressions import PatternError
from tensorweave.router.guided.families import check_pattern_size
from tensorweave.router.guided.features import FEATURES, FORMS, XGRAMMAR_FORMS, Form, features_of
from tensorweave.router.guided.limits import MAX_TEXT_BYTES, GuidedLimits
from tensorweave.router.guided.params import GuideParams
from tensorweave.router.guided.read import SchemaReader
from tensorweave.router.guided.refusal import Refusal
from tensorweave.router.guided.settle import SettledSchema, settle
from tensorweave.router.guided.structural_tag import write_structural_tag
from tensorweave.router.guided.write import write_schema, written_schema

_ANY_OBJECT: Final = {"type": "object"}
_MAX_XGRAMMAR_PATTERN: Final = 1000
"""Its compilation takes 0.3 s for so many repetitions of a class."""


class _Writer:
    def __init__(
        self, params: GuideParams, backend: BackendChoice, limits: GuidedLimits, *, may_be_grammar: bool
    ) -> None:
        self._params = params
        self._forms = XGRAMMAR_FORMS if may_be_grammar and backend == "xgrammar" else FORMS[backend]
        self._backend: GuideBackend = "llguidance" if backend == "llguidance" else "xgrammar"
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
        settled, form = self._settled(schema, self._forms)
        if form == "grammar":
            return Guide("ebnf", write_grammar(settled, self._max_whitespace))
        backend: GuideBackend = "xgrammar" if form == "schema" else "llguidance"
        return Guide("json_schema", write_schema(settled, backend), backend, self._max_whitespace)

    def _settled(self, schema: Any, allowed: Sequence[Form]) -> tuple[SettledSchema, Form]:
        document = read_document(schema, self._limits)
        settled = read_settled(document, self._limits, closes_objects=self._params.disable_additional_properties)
        return settled, choose_form(document, settled, allowed)

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
        is_large = "llguidance" in self._forms and expressions.size(parsed) > _MAX_XGRAMMAR_PATTERN
        return Guide("regex", expressions.write(parsed), "llguidance" if is_large else self._backend)

    def _choice(self) -> Guide:
        choices = self._params.choice
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices or not all(choices):
            raise Refusal(None, "", "must be a list of strings, none of them empty")
        if not all(isinstance(choice, str) for choice in choices):
            raise Refusal(None, "", "must be a list of strings")
        check_size("".join(choices), self._limits)
        try:
            parsed = expressions.Choice(tuple(map(expressions.literal, dict.fromkeys(choices))))
        except PatternError as error:
            raise Refusal(None, "", str(error)) from None
        return Guide("regex", expressions.write(parsed), self._backend)

    def _grammar(self) -> Guide:
        assert self._params.grammar is not None
        check_size(self._params.grammar, self._limits)
        if not self._params.grammar.strip():
            raise Refusal(None, "", "the grammar is empty")
        kind: GuideKind = "lark" if self._backend == "llguidance" else "ebnf"
        return Guide(kind, self._params.grammar, self._backend)

    def _structural_tag(self) -> Guide:
        if self._backend == "llguidance":
            raise Refusal(None, "", "structural tags need the backend xgrammar; this service has llguidance")
        tag = read_json(self._params.structural_tag, self._limits)
        text = write_structural_tag(tag, self._limits, self._max_whitespace, self._schema_in_tag)
        return Guide("structural_tag", text, "xgrammar")

    def _schema_in_tag(self, schema: Any, *, is_json: bool) -> dict[str, Any]:
        settled, form = self._settled(schema, XGRAMMAR_FORMS if is_json else FORMS["xgrammar"])
        if form == "grammar":
            return {"type": "grammar", "grammar": write_grammar(settled, self._max_whitespace)}
        return {"json_schema": written_schema(settled, "xgrammar")}


def guide_for(
    params: GuideParams,
    backend: BackendChoice | None = "auto",
    limits: GuidedLimits | None = None,
    *,
    param: str | None = None,
    may_be_grammar: bool = False,
) -> Guide:
    """The guide that enforces `params`.

    Args:
        params: What the request says: exactly one of json, regex, choice, grammar, json_object, structural_tag.
        backend: The operator's choice. `auto`: xgrammar, and llguidance for what xgrammar would not enforce; None: no
            guides.
        limits: Bounds of size, depth and white space; default: `GuidedLimits()`.
        param: The request's own name for the field, for errors.
        may_be_grammar: With the backend xgrammar, the guide of a schema with expressions may be a grammar (of kind
            ebnf); else it is always a schema.

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
        guide = _Writer(params, backend, limits or GuidedLimits(), may_be_grammar=may_be_grammar).write(given[0])
        if (num_bytes := len(guide.text.encode("utf-8", "surrogatepass"))) > MAX_TEXT_BYTES:
            raise Refusal(None, "", f"as a guide it has {num_bytes} bytes; the limit is {MAX_TEXT_BYTES}")
    except Refusal as refusal:
        raise RequestRejected(f"{name}: {refusal.message}", param=name) from None
    return guide


def read_settled(document: SchemaDocument, limits: GuidedLimits, *, closes_objects: bool = False) -> SettledSchema:
    """Raises Refusal."""
    return settle(SchemaReader(document, limits).union_at, closes_objects=closes_objects)


def choose_form(document: SchemaDocument, schema: SettledSchema, allowed: Sequence[Form]) -> Form:
    """The first form that enforces all of the schema. Raises a Refusal that names what none of them enforces."""
    found = list(dict.fromkeys(pair for union in schema.unions() for pair in features_of(union)))
    missing = {form: [pair for pair in found if form not in FEATURES[pair[0]].forms] for form in allowed}
    for form in allowed:
        if not missing[form]:
            return form
    whom = "any backend" if allowed == FORMS["auto"] else "llguidance" if "llguidance" in allowed else "xgrammar"
    for name, at in found:
        if not FEATURES[name].forms & set(allowed):
            raise Refusal(_keyword(document, name, at), at, f"{FEATURES[name].where} is not enforced by {whom}".strip())
    (name, at), (other, other_at) = missing[allowed[0]][0], missing[allowed[-1]][0]
    reason = f"{FEATURES[name].where} is not enforced together with {_keyword(document, other, other_at)!r}".strip()
    raise Refusal(_keyword(document, name, at), at, f"{reason} at {other_at!r} {FEATURES[other].where}".strip())


def _keyword(document: SchemaDocument, name: str, at: str) -> str:
    """The first of the feature's keywords that the schema has."""
    schema, keywords = document.schema_at(at, at), FEATURES[name].keywords
    return next((key for key in keywords if isinstance(schema, dict) and key in schema), keywords[0])
