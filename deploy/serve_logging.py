"""Our log lines in Serve's replicas keep their level and their tracebacks.

Serve takes everything that a replica writes to its standard error for INFO, our errors among it, and its `print` writes
a tuple of its arguments to any other file, so each line of a logged traceback became `('…',)`.
"""

from __future__ import annotations

import logging

from tensorweave.cluster.log_setup import OUR_LOGGER, LogSettings, set_up_logging
from tensorweave.cluster.ray_internals import restore_print, serve_logger_name


def log_in_replica(settings: LogSettings, process: str) -> None:
    """Our loggers write to the process's own standard error, in the service's form, and where Serve's does, in Serve's.
    `print` is Python's own again."""
    restore_print()
    logging.getLogger(OUR_LOGGER).handlers = list(logging.getLogger(serve_logger_name()).handlers)
    set_up_logging(settings, process)
