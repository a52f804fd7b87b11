"""Whether a Ray that is about to be started here has room for its files: on a full disk Ray itself only times out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from tensorweave.cluster.ray_internals import log_folder

_LEAST_FREE_BYTES: Final = 64 << 20


def why_no_room(folder: Path | None = None) -> str | None:
    """Why Ray cannot keep its sessions in `folder` (default: where it would); None if it can."""
    folder = folder or log_folder().parents[1]
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < _LEAST_FREE_BYTES:
        return (
            f"No space left on device: {free / 1e6:.1f} MB are free in '{folder}', and its logs and sockets need "
            f"{_LEAST_FREE_BYTES / 1e6:.0f} MB there; RAY_TMPDIR names another folder"
        )
    if not os.access(existing, os.W_OK):
        return f"nothing can be written to '{existing}'; RAY_TMPDIR names another folder"
    return None
