"""How a gang creates the actors of its ranks, and which errors their calls raise."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.rank_watch import first_line


def create_rank_actor(
    spec: GangSpec, worker_class: type[Any], group: PlacementGroup, rank: int, name: str, namespace: str | None
) -> ActorHandle[Any]:
    """Create a rank's actor. With a `namespace` it is detached: a successor of its creator finds it by its `name`."""
    detached = {"lifetime": "detached", "name": name, "namespace": namespace}
    actor: ActorHandle[Any] = (
        ray.remote(worker_class)
        .options(
            num_cpus=spec.bundle.get("CPU", 0),
            num_gpus=spec.gpus_per_rank,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            runtime_env=spec.runtime_env,
            **(detached if namespace is not None else {}),
        )
        .remote(**spec.worker_options)
    )
    return actor


def rank_name(group_name: str, rank: int) -> str:
    """The name of a detached rank's actor."""
    return f"{group_name}-{rank}"


def start_error(gang_id: str, error: RayError, prefix: str = "") -> Exception:
    """The error to raise when a rank's start has failed: a rank's ValueError is the user's mistake and stays one."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, NotReady | WorkerLost):
        return cause
    if isinstance(cause, ValueError):
        return ValueError(f"{prefix}{cause}")
    why = f"{type(cause or error).__name__}: {first_line(cause or error)}"
    return WorkerLost(f"gang {gang_id} failed to start: {prefix}{why}")
