"""Readers of one field of a message: the value, or `WireError` that names the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from tensorweave.cluster.errors import WireError


def checked(value: Any, name: str, *kinds: type) -> Any:
    """The value, if it is of one of these types; bool is no int here."""
    if type(value) not in kinds:
        raise WireError(f"{name} is a {type(value).__name__}")
    return value


def as_int(value: Any, name: str) -> int:
    return cast(int, checked(value, name, int))


def as_number(value: Any, name: str) -> float:
    return cast(float, checked(value, name, float, int))


def as_int_or_none(value: Any, name: str) -> int | None:
    return cast("int | None", checked(value, name, int, type(None)))


def as_flag(value: Any, name: str) -> bool:
    return cast(bool, checked(value, name, bool))


def as_bytes(value: Any, name: str) -> bytes:
    return cast(bytes, checked(value, name, bytes))


def tuple_of(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    return lambda value, name: tuple(read(item, name) for item in checked(value, name, list, tuple))
