"""`ResourceRequests`: asks Ray's autoscaler, where there is one, for room for all gangs that are wanted.

A placement group that waits is a request too, but of one gang; what is asked for here makes room for all at once, and
keeps it while gangs are replaced. It is a lower bound that holds until it is changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ray.exceptions import RayError

from tensorweave.cluster.cluster_resources import can_grow
from tensorweave.cluster.gang_spec import GangSpec

logger = logging.getLogger(__name__)

Bundles = list[dict[str, float]]
Selectors = list[dict[str, str]]


def ask_autoscaler(bundles: Bundles, selectors: Selectors) -> bool:
    """Return whether there is an autoscaler. Blocks."""
    if not can_grow():
        return False
    from ray.autoscaler.sdk import request_resources  # takes long, and is needed only where there is an autoscaler

    request_resources(bundles=bundles, bundle_label_selectors=selectors if any(selectors) else None)
    return True


class ResourceRequests:
    """Plain asyncio. `ask` blocks."""

    def __init__(self, ask: Callable[[Bundles, Selectors], bool] = ask_autoscaler) -> None:
        self._ask = ask
        self._wanted: list[tuple[GangSpec, int]] = []
        self._task: asyncio.Task[None] | None = None

    def update(self, wanted: Sequence[tuple[GangSpec, int]]) -> None:
        """Ask for so many gangs of each spec."""
        if list(wanted) != self._wanted:
            self._wanted = list(wanted)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._send(), name="resource-requests")

    async def withdraw(self) -> None:
        """Ask for nothing any more."""
        self.update([])
        if self._task is not None:
            await self._task

    async def _send(self) -> None:
        sent: list[tuple[GangSpec, int]] | None = None
        while sent != self._wanted:
            sent = self._wanted
            ranks = [spec for spec, count in sent for _ in range(count * spec.mesh.size)]
            bundles = [dict(spec.bundle) for spec in ranks]
            try:
                await asyncio.to_thread(self._ask, bundles, [spec.placement.selector() for spec in ranks])
            except (RayError, ValueError, RuntimeError) as error:
                logger.warning("the autoscaler was not asked for resources: %s", error)
