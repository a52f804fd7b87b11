"""API statuses: `@set_api_status` marks a method that is not committed; `Field(status=…)` does the same for an
argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tensorweave.cluster.llm_args import ApiStatus

_F = TypeVar("_F", bound=Callable[..., object])


def set_api_status(status: ApiStatus) -> Callable[[_F], _F]:
    """Mark a public method as prototype, beta or deprecated; unmarked ones are committed."""

    def mark(method: _F) -> _F:
        method.__api_status__ = status  # type: ignore[attr-defined]
        return method

    return mark
