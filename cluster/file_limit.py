"""How many descriptors this process may open. Ranks and routers need one for each connection."""

from __future__ import annotations

import contextlib
import resource

import psutil


def raise_file_limit() -> None:
    """Allow this process as many descriptors as the system lets it have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # "infinity" may be more than the kernel takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def count_open_files() -> tuple[int, int]:
    """Open descriptors of this process, and its limit; 0 if there is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return psutil.Process().num_fds(), 0 if limit == resource.RLIM_INFINITY else limit
