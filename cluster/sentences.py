"""Describes errors in one sentence: what a library raises or a worker reports, without its traceback.

Called where errors are shown: by the command line, by a service that cannot start, by gangs whose rank has died.
"""

from __future__ import annotations

import re
from typing import Final

from tensorweave.cluster.errors import TensorweaveError

_MOST_CHARS: Final = 500
_TRACEBACK: Final = re.compile(r'^(Traceback \(most recent call last\)|\s+File ".*", line )', re.MULTILINE)


def sentence_of(error: BaseException) -> str:
    """Describe the error: by its message if it is ours or a ValueError, with the file if the system raised it, and with
    its type otherwise."""
    if isinstance(error, (TensorweaveError, ValueError)) and str(error).strip():
        return str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        return ": ".join([error.strerror, *(str(name) for name in (error.filename, error.filename2) if name)])
    kind = type(error).__name__
    line = essence(str(error))
    return line if kind in ("Exception", "RuntimeError") and line else f"{kind}: {line}" if line else kind


def essence(text: str) -> str:
    """The first line of a text; the last one if it is a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    return (lines[-1] if _TRACEBACK.search(text) else lines[0])[:_MOST_CHARS]
