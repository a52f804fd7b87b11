"""`PoolLogitsProcessors`: the logits processors of all gangs of a pool, present and future ones.

Values are references that Ray passes to the ranks; nothing is loaded here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tensorweave.cluster.errors import TensorweaveError

logger = logging.getLogger(__name__)


class ProcessorGang(Protocol):
    gang_id: str

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None: ...


class PoolLogitsProcessors:
    def __init__(self) -> None:
        self._processors: Mapping[str, Any] = {}

    async def update(self, gangs: Sequence[ProcessorGang], processors: Mapping[str, Any]) -> None:
        """Set processors on these gangs; None removes one. Raises ValueError; a gang that is lost meanwhile is
        ignored."""
        merged = {**self._processors, **processors}
        self._processors = {name: reference for name, reference in merged.items() if reference is not None}
        calls = (gang.set_logits_processors(processors) for gang in gangs)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, TensorweaveError):
                raise error

    async def install(self, gang: ProcessorGang) -> None:
        """Set all processors on a new gang, including those that are added meanwhile."""
        installed: Mapping[str, Any] = {}
        while self._processors and installed is not self._processors:
            installed = self._processors
            try:
                await gang.set_logits_processors(installed)
            except ValueError as error:  # other gangs could load it; this one refuses requests that name it
                logger.warning("gang %s: %s", gang.gang_id, error)
