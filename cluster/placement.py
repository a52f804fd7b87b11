"""Placement groups for gangs: a bundle a rank, all on one node where they fit, and a clear word on what is missing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from tensorweave.cluster.errors import NotReady

_ONE_NODE_WAIT_S: Final = 10.0
"""How long a gang waits for room on one node before it takes several."""


async def place(bundle: Mapping[str, float], num_bundles: int, timeout_s: float, name: str) -> PlacementGroup:
    """Reserve the bundles. Raises NotReady, naming what is missing, when they cannot be had in time."""
    wanted = [dict(bundle) for _ in range(num_bundles)]
    need = {resource: amount * num_bundles for resource, amount in bundle.items()}
    left_s = timeout_s
    if num_bundles > 1 and await asyncio.to_thread(_fits_one_node, need):
        wait_s = min(_ONE_NODE_WAIT_S, timeout_s / 2)
        left_s -= wait_s
        if group := await _reserve(wanted, "STRICT_PACK", wait_s, name):
            return group
    if group := await _reserve(wanted, "PACK", left_s, name):
        return group
    raise NotReady(await asyncio.to_thread(_explain, bundle, num_bundles, need, timeout_s))


async def _reserve(
    bundles: Sequence[dict[str, float]], strategy: str, timeout_s: float, name: str
) -> PlacementGroup | None:
    group = await asyncio.to_thread(placement_group, list(bundles), strategy, name)
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


def remove_groups(prefix: str) -> None:
    """Remove the groups whose names start so: whatever one supervisor has left, in this life or an earlier one."""
    for row in ray.util.placement_group_table().values():
        if row["name"].startswith(prefix) and row["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # gone in between
                remove_placement_group(ray.util.get_placement_group(row["name"]))


def _explain(bundle: Mapping[str, float], num_bundles: int, need: Mapping[str, float], timeout_s: float) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = live_nodes()
    has = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name} free" for name in need)
    short = [
        f"{amount - free.get(name, 0.0):g} {name}" for name, amount in need.items() if free.get(name, 0.0) < amount
    ]
    missing = f"missing: {', '.join(short)}" if short else "enough in sum, but no node has room for a whole rank"
    each = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    return (
        f"cannot place a gang of {num_bundles} rank(s) with {each} each within {timeout_s:g} s: "
        f"the Ray cluster has {has} on {len(nodes)} node(s); {missing}"
    )
