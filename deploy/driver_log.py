"""`driver_log`: the log of the process that starts a service: its progress, and what Ray shows of the others' logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tensorweave.cluster.forwarded_lines import print_as_json
from tensorweave.cluster.log_setup import LogSettings, formatter_of
from tensorweave.cluster.ray_noise import without_noise
from tensorweave.deploy.progress import PROGRESS_LOGGER

_PROCESS: Final = "driver"


@contextmanager
def driver_log(settings: LogSettings) -> Iterator[None]:
    """Enter it before Ray is started or joined. As text, progress lines begin with our name, as a command's do."""
    is_json = settings.format == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_of("json", _PROCESS) if is_json else logging.Formatter("tensorweave: %(message)s"))
    progress, root = logging.getLogger(PROGRESS_LOGGER), logging.getLogger()
    progress.addHandler(handler)
    progress.propagate = False
    progress.setLevel(logging.INFO)
    if is_json:
        root.addHandler(handler)
    try:
        with without_noise(print_as_json if is_json else None):
            yield
    finally:
        progress.removeHandler(handler)
        root.removeHandler(handler)


def format_rays_own(settings: LogSettings) -> None:
    """Once Ray has started: what it tells of itself in this process has the same form."""
    if settings.format == "json":
        for handler in logging.getLogger("ray").handlers:
            handler.setFormatter(formatter_of("json", _PROCESS))
