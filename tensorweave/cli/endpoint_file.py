"""`--endpoint-file`: where a service that was started by a script can be reached, for as long as it can."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def endpoint_file(path: Path) -> Iterator[Callable[[str], None]]:
    """What is yielded writes a service's URL to `path`, whole at once; at the end of the context the file is gone.

    Raises:
        ValueError: The folder does not exist, or nothing can be written there.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--endpoint-file: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--endpoint-file: nothing can be written to {str(path.parent)!r}")
    path.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.part")

    def write(url: str) -> None:
        part.write_text(url + "\n", encoding="utf-8")
        part.rename(path)

    try:
        yield write
    finally:
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
