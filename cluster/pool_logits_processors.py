"""`PoolLogitsProcessors`: the logits processors that all gangs of a pool hold, those of today and those to come.

Values are references that Ray hands to the ranks; nothing is loaded here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tensorweave.cluster.errors import TensorweaveError

logger = logging.getLogger(__name__)


class Holder(Protocol):
    gang_id: str

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None: ...


class PoolLogitsProcessors:
    def __init__(self) -> None:
        self._held: Mapping[str, Any] = {}

    async def give(self, gangs: Sequence[Holder], processors: Mapping[str, Any]) -> None:
        """To these gangs now; None takes one away. Raises ValueError; a gang that is lost meanwhile is no error."""
        merged = {**self._held, **processors}
        self._held = {name: reference for name, reference in merged.items() if reference is not None}
        told = (gang.set_logits_processors(processors) for gang in gangs)
        for error in await asyncio.gather(*told, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, TensorweaveError):
                raise error

    async def equip(self, gang: Holder) -> None:
        """A new gang gets all, also what comes while it is being told."""
        given: Mapping[str, Any] = {}
        while self._held and given is not self._held:
            given = self._held
            try:
                await gang.set_logits_processors(given)
            except ValueError as error:  # others could load it; here requests that name it will be refused
                logger.warning("gang %s: %s", gang.gang_id, error)
