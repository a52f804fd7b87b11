"""Placement groups for gangs: one bundle per rank, all on one node if they fit, and an error that says what is
missing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from tensorweave.cluster.cluster_resources import can_grow, read_cluster_resources
from tensorweave.cluster.errors import InsufficientResources
from tensorweave.cluster.ray_internals import placement_group_of

_ONE_NODE_WAIT_S: Final = 10.0
"""How long a gang waits for resources on one node before it is placed on several."""
_PLACE_TIMEOUT_S: Final = 20.0
_GROWING_TIMEOUT_S: Final = 600.0


async def place(
    bundle: Mapping[str, float], num_bundles: int, timeout_s: float | None, name: str, *, is_detached: bool = False
) -> PlacementGroup:
    """Reserve the bundles; they are removed with their creator unless `is_detached`.

    Raises InsufficientResources, which names what is missing, at the timeout: without a `timeout_s` after 20 s, or
    after 600 s if the cluster has an autoscaler."""
    if timeout_s is None:
        timeout_s = _GROWING_TIMEOUT_S if await asyncio.to_thread(can_grow) else _PLACE_TIMEOUT_S
    wanted = [dict(bundle) for _ in range(num_bundles)]
    need = {resource: amount * num_bundles for resource, amount in bundle.items()}
    left_s = timeout_s
    if num_bundles > 1 and await asyncio.to_thread(_fits_one_node, need):
        wait_s = min(_ONE_NODE_WAIT_S, timeout_s / 2)
        left_s -= wait_s
        if group := await _reserve(wanted, "STRICT_PACK", wait_s, name, is_detached):
            return group
    if group := await _reserve(wanted, "PACK", left_s, name, is_detached):
        return group
    resources = await asyncio.to_thread(read_cluster_resources)
    raise InsufficientResources(resources.explain(bundle, num_bundles, timeout_s))


async def _reserve(
    bundles: Sequence[dict[str, float]], strategy: str, timeout_s: float, name: str, is_detached: bool
) -> PlacementGroup | None:
    lifetime = "detached" if is_detached else None
    group = await asyncio.to_thread(placement_group, list(bundles), strategy, name, lifetime)
    is_placed = False
    try:
        is_placed = await asyncio.to_thread(group.wait, max(1.0, timeout_s))
    finally:
        if not is_placed:
            remove_placement_group(group)
    return group if is_placed else None


def _fits_one_node(need: Mapping[str, float]) -> bool:
    return any(all(_has(node, resource) >= amount for resource, amount in need.items()) for node in live_nodes())


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


def live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def live_node_ids() -> set[str]:
    return {node["NodeID"] for node in live_nodes()}


def placed_on(group: PlacementGroup) -> list[tuple[str, str]]:
    """The node ids and addresses of a group's bundles. Blocks."""
    node_ids: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [(node_id, addresses.get(node_id, node_id)) for _, node_id in sorted(node_ids.items())]


@dataclass(frozen=True, slots=True)
class NamedGroup:
    """An existing placement group."""

    name: str
    group: PlacementGroup
    is_placed: bool


def find_groups(prefix: str) -> list[NamedGroup]:
    """The groups whose names start with `prefix`: those of one supervisor, including before a restart. Blocks."""
    return [
        NamedGroup(row["name"], placement_group_of(row["placement_group_id"]), row["state"] == "CREATED")
        for row in ray.util.placement_group_table().values()
        if row["name"].startswith(prefix) and row["state"] != "REMOVED"
    ]


def remove_groups(prefix: str) -> None:
    """Remove the groups whose names start with `prefix`, which ends the actors in them. Blocks."""
    for found in find_groups(prefix):
        remove_placement_group(found.group)
