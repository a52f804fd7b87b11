"""Starts the actor of `cluster.supervisor`, or finds the one that is running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray.actor import ActorHandle

from tensorweave.cluster.log_setup import LogSettings
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.process_sentinel import OwnSentinel
from tensorweave.cluster.service_state import DetachedSpec
from tensorweave.cluster.supervisor import PoolSupervisor

_MAX_RESTARTS: Final = 10
_MAX_CONCURRENT_CALLS: Final = 1000


def start_supervisor(
    pools: Sequence[PoolSpec], worker_class: type[Any], *, sentinel: OwnSentinel | None = None
) -> ActorHandle[PoolSupervisor]:
    """Start the actor. It and its gangs end with `sentinel`. Without one it ends with its creator, and its placement
    groups are removed when the job ends. Ray must be running."""
    name, lifetime = (None, None) if sentinel is None else (sentinel.name, "detached")
    return _start(pools, worker_class, name, None, None, None, max_restarts=_MAX_RESTARTS, lifetime=lifetime)


def find_or_start_supervisor(
    detached: DetachedSpec,
    pools: Sequence[PoolSpec],
    worker_class: type[Any],
    log: LogSettings | None = None,
    adapters: Mapping[str, str] | None = None,
) -> ActorHandle[PoolSupervisor]:
    """Return the supervisor of this name; start it if there is none. One that was running keeps its pools: see
    `apply`."""
    return _start(
        *(pools, worker_class, None, detached, log, adapters),
        max_restarts=-1,
        name=detached.name,
        namespace=detached.namespace,
        lifetime="detached",
        get_if_exists=True,
        resources=dict(detached.resources),
    )


def _start(
    pools: Sequence[PoolSpec],
    worker_class: type[Any],
    sentinel: str | None,
    detached: DetachedSpec | None,
    log: LogSettings | None,
    adapters: Mapping[str, str] | None,
    **options: Any,
) -> ActorHandle[PoolSupervisor]:
    actor: ActorHandle[PoolSupervisor] = (
        ray.remote(PoolSupervisor)
        .options(num_cpus=0, max_task_retries=0, max_concurrency=_MAX_CONCURRENT_CALLS, **options)
        .remote(tuple(pools), worker_class, sentinel, detached, log, adapters)
    )
    return actor
