"""`HistoryModel`: parts of a conversation, which clients send back with whatever other servers put there."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, model_validator

from tensorweave.router.openai.parsing import Strict


def says_nothing(value: Any) -> bool:
    """Whether it is null, empty, or an object of such values. It may be nested deeply, so there is no recursion."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif value is not None and value != "" and value != []:
            return False
    return True


class HistoryModel(Strict):
    """Unknown keys are accepted if they say nothing."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key in cls.model_fields or not says_nothing(value)}
