"""Our log lines in Serve's replicas keep their level and their tracebacks.

Serve takes everything that a replica writes to its standard error for INFO, our errors among it, and its `print` writes
a tuple of its arguments to any other file, so each line of a logged traceback became `('…',)`.
"""

from __future__ import annotations

import logging

from tensorweave.cluster.ray_internals import restore_print, serve_logger_name


def log_through_serve() -> None:
    """In a replica: our loggers write where Serve's does, and `print` is Python's own again."""
    restore_print()
    ours = logging.getLogger("tensorweave")
    ours.handlers = list(logging.getLogger(serve_logger_name()).handlers)
    ours.propagate = not ours.handlers
