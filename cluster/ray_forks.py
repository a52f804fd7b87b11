"""Keeps a forked child's hands off its parent's Ray.

A child inherits what Ray has registered for the end of a process: to leave the cluster, for which it waits for threads
that it does not have, and to kill the processes of a private cluster, which are its parent's.
"""

from __future__ import annotations

import atexit
import functools
import os

import ray
from ray._private import worker


@functools.cache
def spare_ray_in_forks() -> None:
    """From now on, in every child of this process that is forked and not executed anew."""
    os.register_at_fork(after_in_child=_forget_ray)


def _forget_ray() -> None:
    """Ray 2.60 registers `ray.shutdown`, and a closure that kills what `all_processes` holds, for SIGTERM too."""
    atexit.unregister(ray.shutdown)
    node = worker._global_node
    if node is not None:
        node.all_processes.clear()
