"""`QuantFields`: one object of a `quantization_config`, read with types; what is not known is refused by key and
value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class QuantFields:
    """`where` names the object in errors, as in 'config.json: quantization_config'."""

    raw: Mapping[str, Any]
    where: str

    def wrong(self, key: str, supported: str) -> ValueError:
        return ValueError(f"{self.where}.{key} is {self.raw.get(key)!r}; supported: {supported}")

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Values that switch a key off (null, false, 0, empty) are harmless."""
        for key, value in self.raw.items():
            if key not in known and value:
                raise ValueError(f"{self.where}.{key} is {value!r}, a key that is not supported")

    def require(self, key: str, *values: Any) -> None:
        """A key that is there must have one of `values`."""
        if self.raw.get(key) is not None and self.raw[key] not in values:
            raise self.wrong(key, ", ".join(repr(value) for value in values))

    def choice(self, key: str, values: Collection[str], default: str | None = None) -> str:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value.lower() not in values:
            raise self.wrong(key, ", ".join(values))
        return value.lower()

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "a whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def names(self, *keys: str) -> tuple[str, ...]:
        """All strings of the lists under `keys`."""
        found: list[str] = []
        for key in keys:
            value = self.raw.get(key) or []
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise self.wrong(key, "a list of names")
            found += value
        return tuple(found)

    def inner(self, key: str) -> QuantFields | None:
        """The object under `key`; None: there is none."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return QuantFields(value, f"{self.where}.{key}")
