"""The command line's boundary: whatever a command raises ends as one sentence on standard error and an exit code.

A person's mistake, our own errors and the system's are a sentence alone. Anything else, of a library or of ours, may be
a bug: its traceback goes to a file, which the sentence names.
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
    """Say what went wrong; returns the exit code: 2 for a mistake in the command or a configuration, else 1."""
    sentence = sentence_of(error)
    if not isinstance(error, _FORESEEN):
        sentence = f"{sentence} (an error that tensorweave did not expect; {_keep_traceback(error)})"
    print(f"tensorweave: {sentence}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, RequestRejected)) else 1


def _keep_traceback(error: Exception) -> str:
    """Where it is."""
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="tensorweave-error-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as failure:
        sys.stderr.write(text)
        return f"its traceback is above, for it could not be written to a file: {sentence_of(failure)}"
    return f"its traceback is in {path}, and `tensorweave --traceback COMMAND` shows it"
