"""What Ray tells a driver although it means nothing: calls that a Serve controller leaves open when it ends itself.

Serve's shutdown kills its controller in the end, in the middle of the very call that asks for it, and of the long polls
of its routers. Ray tells the driver of each such call ("Task ServeController.graceful_shutdown failed …"). A controller
that dies of anything but `ray.kill`, which Serve's shutdown alone calls on it, is told as before.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final

from ray._private import worker

_NOISE: Final = re.compile(
    r"Task ServeController\.\w+ failed\..*The actor is dead because it was killed by `ray\.kill`"
)


def is_noise(message: str) -> bool:
    return _NOISE.search(message) is not None


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Every other message of Ray is printed while this lasts; enter it before Ray is started or joined."""
    tell = worker.print_to_stdstream

    def tell_what_matters(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not is_noise(line)]
        if lines or not data["lines"]:
            tell({**data, "lines": lines}, ignore_prefix)

    worker.print_to_stdstream = tell_what_matters
    try:
        yield
    finally:
        worker.print_to_stdstream = tell
