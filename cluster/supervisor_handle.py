"""What drivers and front ends do with the handle of a running supervisor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.service_state import DetachedSpec

logger = logging.getLogger(__name__)

_SET_TIMEOUT_S: Final = 60.0
_STOP_GRACE_S: Final = 30.0


def find_supervisor(detached: DetachedSpec) -> ActorHandle[Any]:
    """Raises ValueError if there is none. Blocks."""
    actor: ActorHandle[Any] = ray.get_actor(detached.name, detached.namespace)
    return actor


async def give_logits_processors(
    supervisor: ActorHandle[Any], processors: Mapping[str, Callable[..., object] | None]
) -> None:
    """Send logits processors to every rank, through Ray, since these processes trust each other. Raises ValueError or
    NotReady."""
    try:
        references = {name: None if each is None else ray.put(each) for name, each in processors.items()}
    except TypeError as error:
        raise ValueError(f"a logits processor cannot be sent to the ranks: {error}") from error
    try:
        async with asyncio.timeout(_SET_TIMEOUT_S):
            await supervisor.set_logits_processors.remote(references)
    except TimeoutError:
        raise NotReady(f"the ranks did not load a logits processor within {_SET_TIMEOUT_S:g} s") from None
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            raise ValueError(str(cause)) from error
        raise NotReady(f"the supervisor does not answer: {type(error).__name__}") from error


def stop_supervisor(supervisor: ActorHandle[Any]) -> None:
    """Stop the pools at once and end the actor. Blocks; for drivers."""
    try:
        ray.get(supervisor.stop.remote(), timeout=_STOP_GRACE_S)
    except RayError as error:
        logger.warning("the supervisor did not stop cleanly: %s", error)
    finally:
        ray.kill(supervisor, no_restart=True)
