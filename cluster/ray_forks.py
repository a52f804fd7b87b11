"""Keeps a forked child's hands off its parent's Ray.

A child inherits what Ray has registered for the end of a process: to leave the cluster, for which it waits for threads
that it does not have, and to kill the processes of a private cluster, which are its parent's.
"""

from __future__ import annotations

import functools
import os

from tensorweave.cluster.ray_internals import forget_ray_after_fork


@functools.cache
def spare_ray_in_forks() -> None:
    """From now on, in every child of this process that is forked and not executed anew."""
    os.register_at_fork(after_in_child=forget_ray_after_fork)
