"""The request fields that say what form an answer has, as OpenAI, TensorRT-LLM and vLLM spell them.

A request gives one of them at most; `router/guided` makes a guide of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.guided.params import KINDS, GuideParams
from tensorweave.router.openai.parsing import Strict
from tensorweave.router.openai.service_fields import ServiceFields

_EXTENSION: Final = "Extension."

Schema = Annotated[dict[str, Any] | bool, Field(description="A JSON schema.")]


class JsonSchemaSpec(Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = Field(None, description="The schema is always enforced.")


class ResponseFormat(Strict):
    """OpenAI's types, and TensorRT-LLM's: each with the fields of its own."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "ebnf", "structural_tag"]
    json_schema: JsonSchemaSpec | None = Field(None, description="Of json_schema.")
    schema_: Schema | None = Field(None, alias="schema", description=f"{_EXTENSION} Of json, and of json_object.")
    regex: str | None = Field(None, description=f"{_EXTENSION} Of regex.")
    ebnf: str | None = Field(None, description=f"{_EXTENSION} Of ebnf: a grammar.")
    format: dict[str, Any] | None = Field(None, description=f"{_EXTENSION} Of structural_tag, in xgrammar's form.")
    structures: list[dict[str, Any]] | None = Field(None, description=f"{_EXTENSION} Of structural_tag: older form.")
    triggers: list[str] | None = Field(None, description=f"{_EXTENSION} Of structural_tag: older form.")

    @model_validator(mode="after")
    def _check_fields(self) -> ResponseFormat:
        given = self.model_dump(by_alias=True, exclude_none=True).keys() - {"type"}
        needed, possible = _FIELDS_OF_TYPES[self.type]
        if foreign := sorted(given - {*needed, *possible}):
            param = f"response_format.{foreign[0]}"
            raise RequestRejected(f"{param} is no field of the type {self.type}", param=param)
        if missing := sorted(set(needed) - given):
            param = f"response_format.{missing[0]}"
            raise RequestRejected(f"the type {self.type} needs {param}", param=param)
        return self

    @property
    def asked(self) -> tuple[GuideParams, str] | None:
        """What the answer must match, and the name of the field that says so."""
        if self.json_schema is not None:
            return GuideParams(json=self.json_schema.schema_), "response_format.json_schema.schema"
        if self.schema_ is not None:
            return GuideParams(json=self.schema_), "response_format.schema"
        match self.type:
            case "json_object":
                return GuideParams(json_object=True), "response_format"
            case "regex":
                return GuideParams(regex=self.regex), "response_format.regex"
            case "ebnf":
                return GuideParams(grammar=self.ebnf), "response_format.ebnf"
            case "structural_tag":
                return GuideParams(structural_tag=self.model_dump(exclude_none=True)), "response_format"
        return None


_FIELDS_OF_TYPES: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "text": ((), ()),
    "json_object": ((), ("schema",)),
    "json_schema": (("json_schema",), ()),
    "json": (("schema",), ()),
    "regex": (("regex",), ()),
    "ebnf": (("ebnf",), ()),
    "structural_tag": ((), ("format", "structures", "triggers")),
}
"""The fields that each type needs, and those that it may have."""


class StructuredOutputs(Strict):
    """vLLM's form: exactly one of the first six."""

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = Field(False, description="JSON in its compact form.")
    disable_additional_properties: bool = Field(False, description="No properties but those that the schema declares.")
    whitespace_pattern: str | None = Field(None, description="Not supported: `disable_any_whitespace` bounds it.")

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if len(given := self.params.given) != 1:
            found = " and ".join(given) or "none"
            raise RequestRejected(
                f"structured_outputs must have exactly one of {', '.join(KINDS)}, not {found}",
                param="structured_outputs",
            )
        if self.whitespace_pattern is not None:
            raise RequestRejected(
                "structured_outputs.whitespace_pattern is not supported: white space is bounded by the server, and "
                "disable_any_whitespace leaves none",
                param="structured_outputs.whitespace_pattern",
            )
        return self

    @property
    def params(self) -> GuideParams:
        return GuideParams(
            json=self.json_,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=bool(self.json_object),
            structural_tag=self.structural_tag,
            max_whitespace=0 if self.disable_any_whitespace else None,
            disable_additional_properties=self.disable_additional_properties,
        )


class GuidedFields(ServiceFields):
    """The fields of both bodies."""

    response_format: ResponseFormat | None = Field(None, description="The form of the answer.")
    structured_outputs: StructuredOutputs | None = Field(None, description=f"{_EXTENSION} As in vLLM.")
    guided_json: Schema | str | None = Field(None, description=f"{_EXTENSION} As structured_outputs.json.")
    guided_regex: str | None = Field(None, description=f"{_EXTENSION} As structured_outputs.regex.")
    guided_choice: list[str] | None = Field(
        None, min_length=1, description=f"{_EXTENSION} As structured_outputs.choice."
    )
    guided_grammar: str | None = Field(None, description=f"{_EXTENSION} As structured_outputs.grammar.")

    @property
    def guide_params(self) -> tuple[GuideParams, str] | None:
        """What the answer must match, and the name of the field that says so. Raises RequestRejected if several do."""
        form = None if self.response_format is None else self.response_format.asked
        asked = [pair for pair in (form, self._of_outputs(), *self._of_guided()) if pair]
        if len(asked) > 1:
            first, second = asked[0][1].split(".")[0], asked[1][1].split(".")[0]
            raise RequestRejected(f"{first} and {second} exclude each other", param=second)
        return asked[0] if asked else None

    def _of_outputs(self) -> tuple[GuideParams, str] | None:
        outputs = self.structured_outputs
        return None if outputs is None else (outputs.params, f"structured_outputs.{outputs.params.given[0]}")

    def _of_guided(self) -> list[tuple[GuideParams, str]]:
        given: list[tuple[GuideParams, str]] = []
        if self.guided_json is not None:
            given.append((GuideParams(json=self.guided_json), "guided_json"))
        if self.guided_regex is not None:
            given.append((GuideParams(regex=self.guided_regex), "guided_regex"))
        if self.guided_choice is not None:
            given.append((GuideParams(choice=self.guided_choice), "guided_choice"))
        if self.guided_grammar is not None:
            given.append((GuideParams(grammar=self.guided_grammar), "guided_grammar"))
        return given
