"""Errors as one sentence for a person: what a library raises or a worker reports, without its traceback.

Called where an error ends: by the command line, by the service that cannot start, by gangs that tell why a rank died.
"""

from __future__ import annotations

import re
from typing import Final

from tensorweave.cluster.errors import TensorweaveError

_MOST_CHARS: Final = 500
_TRACEBACK: Final = re.compile(r'^(Traceback \(most recent call last\)|\s+File ".*", line )', re.MULTILINE)


def sentence_of(error: BaseException) -> str:
    """What went wrong. Our own errors and a person's mistakes speak for themselves; the system's name their file; of
    others, the type says what the text may leave open."""
    if isinstance(error, (TensorweaveError, ValueError)) and str(error).strip():
        return str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        return ": ".join([error.strerror, *(str(name) for name in (error.filename, error.filename2) if name)])
    kind = type(error).__name__
    line = essence(str(error))
    return line if kind in ("Exception", "RuntimeError") and line else f"{kind}: {line}" if line else kind


def essence(text: str) -> str:
    """One line of a text of several: of a traceback the last one, else the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    return (lines[-1] if _TRACEBACK.search(text) else lines[0])[:_MOST_CHARS]
