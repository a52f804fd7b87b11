"""API statuses: `@set_api_status` marks a method or a whole class that is not committed; `Field(status=…)` marks an
argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar, get_args

from tensorweave.cluster.strict_model import ApiStatus

_F = TypeVar("_F", bound=Callable[..., object])


def set_api_status(status: ApiStatus) -> Callable[[_F], _F]:
    """Mark a public method or class as prototype, beta or deprecated, also in its docstring; others are committed."""
    if status not in get_args(ApiStatus):
        raise ValueError(f"status is {status!r}, must be one of {', '.join(get_args(ApiStatus))}")

    def mark(method: _F) -> _F:
        method.__api_status__ = status  # type: ignore[attr-defined]
        if method.__doc__:
            method.__doc__ = f"{inspect.cleandoc(method.__doc__)}\n\nStatus:\n    {status}"
        return method

    return mark


def api_status(method: object) -> ApiStatus | None:
    """None: committed."""
    status: ApiStatus | None = getattr(method, "__api_status__", None)
    return status
