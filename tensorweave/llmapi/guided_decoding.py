"""`GuidedDecodingParams`: the form that an output must have, as users of the LLM API say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tensorweave.cluster.guide import BackendChoice, Guide
from tensorweave.llmapi.status import set_api_status
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams

_FIELD = "guided_decoding"


@set_api_status("prototype")
@dataclass(kw_only=True, slots=True)
class GuidedDecodingParams:
    """The form of an output; at most one of these is given. An output that ends with finish_reason 'stop' has it; one
    that ends with 'length' is the beginning of such an output. docs/structured_output.md says what is enforced.

    Args:
        json: A JSON schema: text, a dict, or a pydantic model.
        regex: A regular expression that the whole output matches.
        grammar: A grammar in EBNF, from its rule `root` on; in Lark if the backend is llguidance.
        json_object: Any JSON object.
        structural_tag: xgrammar's structural tag, as JSON: text with parts that have a form.
        choice: The output is one of these strings. TensorRT-LLM does not have it.
    """

    json: str | dict[str, Any] | BaseModel | type[BaseModel] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None
    choice: Sequence[str] | None = None


def read_guide(params: Any, backend: BackendChoice | None) -> Guide | None:
    """Raises ValueError for what is wrong or what nobody enforces."""
    if params is None:
        return None
    if not isinstance(params, GuidedDecodingParams):
        raise ValueError(f"{_FIELD} is a {type(params).__name__}, must be GuidedDecodingParams")
    _check(params)
    read = GuideParams(
        json=_schema(params.json),
        regex=params.regex,
        choice=params.choice,
        grammar=params.grammar,
        json_object=params.json_object,
        structural_tag=params.structural_tag,
    )
    if not read.given:
        return None
    return guide_for(read, backend, param=f"{_FIELD}.{read.given[0]}", may_be_grammar=True)


def _check(params: GuidedDecodingParams) -> None:
    for name in ("regex", "grammar", "structural_tag"):
        if not isinstance(getattr(params, name), str | None):
            raise ValueError(f"{_FIELD}.{name} is a {type(getattr(params, name)).__name__}, must be a string")
    if not isinstance(params.json_object, bool):
        raise ValueError(f"{_FIELD}.json_object is {params.json_object!r}, must be True or False")


def _schema(given: Any) -> Any:
    if isinstance(given, BaseModel) or (isinstance(given, type) and issubclass(given, BaseModel)):
        return given.model_json_schema()
    if given is not None and not isinstance(given, str | Mapping):
        raise ValueError(f"{_FIELD}.json is a {type(given).__name__}, must be text, a dict or a pydantic model")
    return given
