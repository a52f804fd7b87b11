"""Our log lines in Serve's replicas keep their level and their tracebacks.

Serve 2.60 takes what a replica writes to its standard error for INFO, our errors among it, and its `print` writes a
tuple of what it was given to any other file, so each line of a logged traceback became `('…',)`.
"""

from __future__ import annotations

import builtins
import logging

from ray.serve._private import logging_utils
from ray.serve._private.constants import SERVE_LOGGER_NAME


def log_through_serve() -> None:
    """In a replica: our loggers write where Serve's does, and `print` is Python's own again."""
    builtins.print = logging_utils.buildin_print
    ours = logging.getLogger("tensorweave")
    ours.handlers = list(logging.getLogger(SERVE_LOGGER_NAME).handlers)
    ours.propagate = not ours.handlers
