"""What Ray tells a driver although it means nothing: calls that a Serve controller leaves open when it ends itself.

Serve's shutdown kills its controller in the end, in the middle of the very call that asks for it, and of the long polls
of its routers. Ray tells the driver of each such call ("Task ServeController.graceful_shutdown failed …"). A controller
that dies of anything but `ray.kill`, which Serve's shutdown alone calls on it, is told as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from tensorweave.cluster.ray_internals import filtered_messages

_NOISE: Final = re.compile(
    r"Task ServeController\.\w+ failed\..*The actor is dead because it was killed by `ray\.kill`"
)


def is_noise(message: str) -> bool:
    return _NOISE.search(message) is not None


def without_noise(show: Callable[[dict[str, Any]], None] | None = None) -> AbstractContextManager[None]:
    """Print every other message of Ray, or let `show` print it, while this lasts. Enter it before Ray is started or
    joined."""
    return filtered_messages(is_noise, show)
