"""`report_for_ever`: a router replica sends its metrics to the process that has the admin port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from tensorweave.cluster.router_report import RouterReport
from tensorweave.router.admin.router_table import IDLE_INTERVAL_S

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_S: Final = 10.0


async def report_for_ever(read: Callable[[], RouterReport], send: Callable[[RouterReport], Awaitable[float]]) -> None:
    """Send this router's metrics as often as is asked for. A router serves on whether or not it can report."""
    while True:
        try:
            async with asyncio.timeout(_REPORT_TIMEOUT_S):
                pause_s = await send(read())
        except (TimeoutError, RayError, RayServeException) as error:
            logger.info("the admin port was not told of this router: %s", type(error).__name__)
            pause_s = IDLE_INTERVAL_S
        await asyncio.sleep(pause_s)
