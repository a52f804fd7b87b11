"""On which hosts the router replicas are, and their addresses."""

from __future__ import annotations

from typing import Any

import ray

from tensorweave.cluster.placement import live_nodes
from tensorweave.deploy.actor_names import HEAD_NODE
from tensorweave.deploy.config_router import RouterConfig


def replica_options(router: RouterConfig) -> dict[str, Any]:
    """Serve's options of the replicas: on the head, beside Ray's own controllers, or one on each live host. Ray must be
    running."""
    if not router.per_host:
        return {"num_replicas": router.replicas, "ray_actor_options": {"num_cpus": 0, "resources": HEAD_NODE}}
    return {"num_replicas": len(live_nodes()), "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0}}


def router_urls(router: RouterConfig) -> list[str]:
    """The URLs of the replicas, the head's first. Ray must be running."""
    if not router.per_host:
        return [
            f"{router.scheme}://{router.reachable_host}:{router.port + number}" for number in range(router.replicas)
        ]
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    addresses = sorted((node["NodeManagerAddress"] for node in live_nodes()), key=lambda address: address != head)
    return [f"{router.scheme}://{address}:{router.port}" for address in addresses]
