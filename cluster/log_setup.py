"""How the processes of a service write their log: each line as text or as a JSON object, on standard error.

Ray keeps what its actors write there in its session's log folder, and shows it at the driver. `set_up_logging` is
called once per process; without it Python's own default is left, as for the LLM class.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, Final, Literal, TextIO

LogFormat = Literal["text", "json"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
OUR_LOGGER: Final = "tensorweave"


@dataclass(frozen=True, slots=True)
class LogSettings:
    format: LogFormat = "text"
    level: LogLevel = "WARNING"


def set_up_logging(settings: LogSettings, process: str, stream: TextIO | None = None) -> None:
    """`process` names this one in its lines. Our own lines are written from `level` on, others' from WARNING on."""
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(formatter_of(settings.format, process))
    handler.addFilter(_is_ours_or_matters)
    root = logging.getLogger()
    for before in [each for each in root.handlers if isinstance(each.formatter, TextFormatter | JsonFormatter)]:
        root.removeHandler(before)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(OUR_LOGGER).setLevel(settings.level)
    logging.captureWarnings(True)


def _is_ours_or_matters(record: logging.LogRecord) -> bool:
    """A library may have set a level of its own, which the root's does not change."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == OUR_LOGGER


def formatter_of(kind: LogFormat, process: str) -> logging.Formatter:
    return JsonFormatter(process) if kind == "json" else TextFormatter(process)


class TextFormatter(logging.Formatter):
    """`2026-11-27 07:20:01,123 WARNING pools: …`"""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process.replace('%', '%%')}: %(message)s")


class JsonFormatter(logging.Formatter):
    """One object per line. `fields` of a record become keys of their own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._host = socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        entry = json_entry(record.created, record.levelname, record.name, record.getMessage())
        entry |= {"process": self._process, "pid": os.getpid(), "host": self._host, **fields}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def json_entry(time_s: float, level: str, logger: str, message: str) -> dict[str, Any]:
    """The keys that every line has."""
    when = datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="milliseconds")
    return {"time": when.replace("+00:00", "Z"), "level": level, "logger": logger, "message": message}
