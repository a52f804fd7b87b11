"""The strict pydantic base that every configuration model shares: `TorchLlmArgs`, its groups, and a service's tables.

Unknown keys are refused with the nearest known name, and all mistakes of a model are reported together.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, Self, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, PydanticUndefined
from pydantic_core.core_schema import ErrorType

from tensorweave.cluster.llm_args_refused import Refusal

ApiStatus = Literal["prototype", "beta", "deprecated"]

_VALUE_ERROR: Final = "value_error"
_PYDANTICS_OWN: Final = frozenset(get_args(ErrorType))
_NUMBERS: Final = (int, float, int | None, float | None)


def Field(default: Any = PydanticUndefined, *, status: ApiStatus | None = None, **kwargs: Any) -> Any:
    """pydantic's Field with an API status, kept in `json_schema_extra["status"]`; no status means committed."""
    if status is not None:
        kwargs["json_schema_extra"] = {**kwargs.get("json_schema_extra", {}), "status": status}
    return pydantic.Field(default, **kwargs)


class RefusedKey(ValueError):
    """A key that a table does not take, or not at this value. `reason` is the message without key and value."""

    def __init__(self, key: str, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.key = key
        self.reason = reason


def mistake(error: ValueError | PydanticCustomError, value: Any) -> InitErrorDetails:
    """One of several mistakes that a model reports together; `value` is where it was found."""
    if isinstance(error, PydanticCustomError):
        return InitErrorDetails(type=error, input=value)
    return InitErrorDetails(type=_VALUE_ERROR, ctx={"error": error}, input=value)


def _known_mistake(item: ErrorDetails) -> InitErrorDetails:
    """A mistake that pydantic has found, to be reported with others."""
    kind = item["type"]
    known: Any = kind if kind in _PYDANTICS_OWN else PydanticCustomError(kind, item["msg"], item.get("ctx"))
    return InitErrorDetails(type=known, loc=item["loc"], input=item["input"], ctx=item.get("ctx", {}))


class StrictBaseModel(BaseModel):
    """Refuses unknown keys, and names the nearest known one. Keys in `refused` are accepted with a neutral value. All
    mistakes are reported at once."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    refused: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _report_all_mistakes(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report mistakes of keys and of values together; a wrong key is not reported for its value again."""
        if not isinstance(data, dict):
            return handler(data)
        kept, mistakes = cls._sift(data)
        try:
            made = handler(kept)
        except pydantic.ValidationError as error:
            refused = {key for key in data if key not in kept}
            found = (
                item for item in error.errors(include_url=False) if item["loc"][:1] not in {(key,) for key in refused}
            )
            mistakes += [_known_mistake(item) for item in found]
        else:
            if not mistakes:
                return made
        raise pydantic.ValidationError.from_exception_data(cls.__name__, mistakes)

    @classmethod
    def _sift(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """The keys to validate, and what is wrong with the others."""
        kept, mistakes = {}, []
        for key, value in data.items():
            refusal = cls.refused.get(key)
            if key in cls.model_fields:
                if isinstance(value, bool) and cls.model_fields[key].annotation in _NUMBERS:
                    mistakes.append(mistake(RefusedKey(key, "is no number", f"{key} = {value!r} is no number"), data))
                else:
                    kept[key] = value
            elif refusal is None:
                unknown = f"unknown key {key!r} in {cls.__name__}{cls._hint(str(key))}"
                mistakes.append(mistake(RefusedKey(str(key), unknown), data))
            elif not refusal.allows(value):
                reason = f"is not supported yet: {refusal.advice}"
                mistakes.append(mistake(RefusedKey(key, reason, f"{key} = {value!r} {reason}"), data))
        return kept, mistakes

    @classmethod
    def _hint(cls, key: str) -> str:
        """A group's own key that stands beside the group, else what is spelt most alike, else all there are."""
        homes = [
            f"{name}.{key}"
            for name, field in cls.model_fields.items()
            if get_origin(field.annotation) is not dict
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, StrictBaseModel) and key in kind.model_fields
        ]
        near = homes or difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
        return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(cls.model_fields)}"
