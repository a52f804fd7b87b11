"""`call_supervisor`: a call for an operator, with the supervisor's refusals as answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError

from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError

FindSupervisor = Callable[[], ActorHandle[Any]]
"""Blocks, and raises ValueError if there is none."""


async def call_supervisor(
    find: FindSupervisor,
    call: Callable[[ActorHandle[Any]], Awaitable[Any]],
    timeout_s: float,
    refuse: Callable[[str], RequestRejected] = RequestRejected,
) -> Any:
    """The call's result. Raises NotReady, what `refuse` makes of a ValueError, and other errors of the supervisor."""
    try:
        async with asyncio.timeout(timeout_s):
            try:
                supervisor = await asyncio.to_thread(find)
            except ValueError:
                raise NotReady("there is no supervisor yet", retry_after_s=5.0) from None
            return await call(supervisor)
    except TimeoutError:
        raise NotReady(f"the supervisor has not finished this within {timeout_s:g} s") from None
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, TensorweaveError) and not isinstance(cause, RequestRejected):
            raise cause from error
        if isinstance(cause, ValueError):
            raise refuse(str(cause)) from error
        raise NotReady(f"the supervisor does not answer: {type(error).__name__}") from error
