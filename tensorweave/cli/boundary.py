"""The command line's boundary: an error of a command becomes one sentence on standard error and an exit code.

Users' mistakes, our own errors and the system's are shown as a sentence only. Any other error may be a bug: its
traceback is written to a file, which the sentence names.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from tensorweave.cluster.errors import RequestRejected, TensorweaveError
from tensorweave.cluster.sentences import sentence_of

_FORESEEN = (ValueError, TensorweaveError, OSError)


def report(error: Exception) -> int:
    """Print the error; return the exit code: 2 for a mistake in the command or a configuration, else 1."""
    sentence = sentence_of(error)
    if not isinstance(error, _FORESEEN):
        sentence = f"{sentence} (an error that tensorweave did not expect; {_keep_traceback(error)})"
    print(f"tensorweave: {sentence}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, RequestRejected)) else 1


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file; return a text that says where it is."""
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="tensorweave-error-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as failure:
        sys.stderr.write(text)
        return f"its traceback is above, for it could not be written to a file: {sentence_of(failure)}"
    return f"its traceback is in {path}, and `tensorweave --traceback COMMAND` shows it"
