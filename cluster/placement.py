"""Placement groups for gangs: one bundle per rank, all on one node if they fit, and an error that says what is
missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from tensorweave.cluster.cluster_resources import can_grow, read_cluster_resources
from tensorweave.cluster.errors import InsufficientResources
from tensorweave.cluster.placement_rule import NodeName, PoolPlaces
from tensorweave.cluster.ray_internals import placement_group_of

_ONE_NODE_WAIT_S: Final = 10.0
"""How long a gang waits for resources on one node before it is placed on several."""
_LOOK_AGAIN_S: Final = 5.0
_PLACE_TIMEOUT_S: Final = 20.0
_GROWING_TIMEOUT_S: Final = 600.0


async def place(
    bundle: Mapping[str, float],
    num_bundles: int,
    timeout_s: float | None,
    name: str,
    *,
    places: PoolPlaces | None = None,
    is_detached: bool = False,
) -> PlacementGroup:
    """Reserve the bundles where the rule of `places` allows it; they are removed with their creator unless
    `is_detached`.

    Raises InsufficientResources, which names what is missing, at the timeout: without a `timeout_s` after 20 s, or
    after 600 s if the cluster has an autoscaler."""
    if timeout_s is None:
        timeout_s = _GROWING_TIMEOUT_S if await asyncio.to_thread(can_grow) else _PLACE_TIMEOUT_S
    places = places or PoolPlaces(name)
    wanted = _Bundles(name, dict(bundle), num_bundles, places, is_detached)
    end_s = time.monotonic() + timeout_s
    if group := await wanted.reserve_on_one_node(timeout_s):
        return group
    while (left_s := end_s - time.monotonic()) > 0:
        if group := await wanted.reserve(left_s):
            return group
    resources = (await asyncio.to_thread(read_cluster_resources)).allowed_by(places.rule)
    raise InsufficientResources(resources.explain(bundle, num_bundles, timeout_s))


@dataclass(frozen=True, slots=True)
class _Bundles:
    """Bundles to reserve, in several ways one after another."""

    name: str
    bundle: dict[str, float]
    count: int
    places: PoolPlaces
    is_detached: bool

    async def reserve_on_one_node(self, timeout_s: float) -> PlacementGroup | None:
        """On the node that the rule prefers, or on any one node, if they fit there; None if that is not so soon."""
        spread = self.places.rule.spread
        is_indifferent = spread == "none" and self.count == 1
        if spread == "ranks" or is_indifferent:
            return None
        nodes = await asyncio.to_thread(self._fitting_nodes)
        wait_s = min(_ONE_NODE_WAIT_S, timeout_s / 2)
        if not nodes:
            return None
        if spread == "none":
            return await self._reserve("STRICT_PACK", wait_s, None if self.places.rule.is_free else nodes)
        placed = await asyncio.to_thread(nodes_of_groups, self.places.prefix)
        with self.places.claim_one(nodes, placed) as node_id:
            return await self._reserve("STRICT_PACK", wait_s, None if node_id is None else [node_id])

    async def reserve(self, timeout_s: float) -> PlacementGroup | None:
        """On any nodes that the rule allows. Nodes that are given by name are looked up again every few seconds."""
        rule = self.places.rule
        strategy = "STRICT_SPREAD" if rule.spread == "ranks" else "PACK"
        if not rule.nodes:
            return await self._reserve(strategy, timeout_s)
        nodes = [node["NodeID"] for node in await asyncio.to_thread(live_nodes) if rule.allows(name_of(node))]
        wait_s = min(_LOOK_AGAIN_S, timeout_s)
        if nodes:
            return await self._reserve(strategy, wait_s, nodes)
        await asyncio.sleep(wait_s)
        return None

    def _fitting_nodes(self) -> list[str]:
        """The allowed nodes that hold all bundles when idle, by address."""
        allowed = [node for node in live_nodes() if self.places.rule.allows(name_of(node))]
        fitting = [
            node
            for node in allowed
            if all(_has(node, resource) >= amount * self.count for resource, amount in self.bundle.items())
        ]
        return [node["NodeID"] for node in sorted(fitting, key=lambda node: str(node["NodeManagerAddress"]))]

    async def _reserve(
        self, strategy: str, timeout_s: float, node_ids: Sequence[str] | None = None
    ) -> PlacementGroup | None:
        selector = self.places.rule.selector(node_ids)
        group = await asyncio.to_thread(
            placement_group,
            [dict(self.bundle) for _ in range(self.count)],
            strategy,
            self.name,
            "detached" if self.is_detached else None,
            bundle_label_selector=[selector] * self.count if selector else None,
        )
        is_placed = False
        try:
            is_placed = await asyncio.to_thread(group.wait, max(1.0, timeout_s))
        finally:
            if not is_placed:
                remove_placement_group(group)
        return group if is_placed else None


def _has(node: Mapping[str, Any], resource: str) -> float:
    return float(node["Resources"].get(resource, 0.0))


def name_of(node: Mapping[str, Any]) -> NodeName:
    """The name of a node that `ray.nodes()` lists."""
    labels = node.get("Labels") or {}
    return NodeName(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"], labels)


def live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def live_node_ids() -> set[str]:
    return {node["NodeID"] for node in live_nodes()}


def placed_on(group: PlacementGroup) -> list[tuple[str, str]]:
    """The node ids and addresses of a group's bundles. Blocks."""
    node_ids: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [(node_id, addresses.get(node_id, node_id)) for _, node_id in sorted(node_ids.items())]


def nodes_of_groups(prefix: str) -> list[str]:
    """The nodes of all placed groups whose names start with `prefix`; a node occurs once per group. Blocks."""
    rows = ray.util.placement_group_table().values()
    return [
        node_id
        for row in rows
        if row["name"].startswith(prefix) and row["state"] == "CREATED"
        for node_id in set(row["bundles_to_node_id"].values())
    ]


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
