"""`writing_into`: errors of a full or read-only disk name the directory, which the system's own do not.

An error of `write` names no file, one of a copy names the source, and the libraries that write tensors raise their own
types. All code that writes a model's files does it inside `writing_into`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")
_GIB: Final = 1 << 30


class DiskFull(OSError):
    """There is no space for a file; the message has the directory and the space that is free there."""


@contextlib.contextmanager
def writing_into(directory: Path) -> Iterator[None]:
    """Raises DiskFull, or the system's own error with a path, if the code inside the block cannot write."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(error.errno, directory) from error
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from error
    except SafetensorError as error:
        code = _OS_ERROR.search(str(error))
        if code is None:
            raise
        number = int(code[1])
        if number in _FULL:
            raise _disk_full(number, directory) from error
        raise OSError(number, os.strerror(number), str(directory)) from error


def _disk_full(number: int, directory: Path) -> DiskFull:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / _GIB
    return DiskFull(number, f"{os.strerror(number)} ({free:.2f} GiB are free there)", str(directory))
