"""`ClusterResources`: what a Ray cluster has and what is reserved, to explain why a gang cannot be placed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import ray

from tensorweave.cluster.placement_rule import NodeName, PlacementRule
from tensorweave.cluster.ray_internals import free_resources_by_node, has_autoscaler

_TOLERANCE: Final = 1e-6
_MOST_LISTED: Final = 8
_RAYS_LABELS: Final = "ray.io/"

Amounts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NodeResources:
    """A live node's resources: all of them, and those that are free."""

    address: str
    total: Amounts
    free: Amounts
    hostname: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> NodeName:
        return NodeName("", self.address, self.hostname, self.labels)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a placement group has reserved."""

    name: str
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """A cluster at one moment."""

    nodes: Sequence[NodeResources]
    holdings: Sequence[Reservation] = ()
    rule: PlacementRule | None = None

    def allowed_by(self, rule: PlacementRule) -> ClusterResources:
        """The part of the cluster that a pool with this rule may use."""
        if rule.is_free:
            return self
        return replace(self, nodes=[node for node in self.nodes if rule.allows(node.name)], rule=rule)

    def total(self, resource: str) -> float:
        return sum(node.total.get(resource, 0.0) for node in self.nodes)

    def free(self, resource: str) -> float:
        return sum(node.free.get(resource, 0.0) for node in self.nodes)

    def num_bundles(self, bundle: Amounts) -> int:
        """How many such bundles fit in the cluster when it is idle. A bundle must fit on one node."""
        return sum(_num_in(node.total, bundle) for node in self.nodes)

    def num_nodes_for(self, bundle: Amounts) -> int:
        """How many nodes hold at least one such bundle when they are idle."""
        return sum(_num_in(node.total, bundle) > 0 for node in self.nodes)

    def explain(self, bundle: Amounts, num_bundles: int, timeout_s: float) -> str:
        """Why the bundles could not be placed: what was requested, what exists where, and who has reserved it."""
        need = {name: amount * num_bundles for name, amount in bundle.items()}
        has = ", ".join(f"{self.free(name):g} of {self.total(name):g} {name} free" for name in need)
        return (
            f"cannot place a gang of {num_bundles} rank(s) with {_list(bundle)} each within {timeout_s:g} s: "
            f"the Ray cluster has {has} on {len(self.nodes)} node(s){self.describe_rule()}; "
            f"{self._verdict(bundle, need, num_bundles)}; "
            f"{self.describe_nodes(bundle)}{self._describe_holdings(bundle)}"
        )

    def _verdict(self, bundle: Amounts, need: Amounts, num_bundles: int) -> str:
        missing = {name: amount - self.free(name) for name, amount in need.items() if self.free(name) < amount}
        what = f"missing: {_list(missing)}" if missing else "enough in sum, but no node has room for a whole rank"
        if any(self.total(name) < amount for name, amount in need.items()):
            return f"{what}; the cluster is too small for it even when idle"
        if (most := self.num_bundles(bundle)) < num_bundles:
            return f"{what}; its nodes hold {most} such rank(s) even when idle, for each must lie on one node"
        return f"{what}; others hold it"

    def describe_rule(self) -> str:
        """What follows 'nodes' where a rule allows only some of them."""
        return "" if self.rule is None else f" that {self.rule.describe()} allows"

    def describe_nodes(self, resources: Iterable[str]) -> str:
        names = list(resources)
        if not self.nodes:
            return "there is no such node"
        each = [
            f"{node.address}: "
            + ", ".join(f"{node.free.get(name, 0.0):g} of {node.total.get(name, 0.0):g} {name} free" for name in names)
            for node in self.nodes
        ]
        return "by node: " + _shorten(each)

    def describe_names(self) -> str:
        """The nodes by address, host name and labels other than Ray's own."""
        each = []
        for node in self.nodes:
            labels = [f"{key}={value}" for key, value in node.labels.items() if not key.startswith(_RAYS_LABELS)]
            each.append(f"{node.address} ({', '.join(filter(None, (node.hostname, *labels)))})")
        return "nodes: " + _shorten(each)

    def _describe_holdings(self, bundle: Amounts) -> str:
        held = [
            (group, {name: group.amounts[name] for name in bundle if name in group.amounts}) for group in self.holdings
        ]
        each = [f"{group.name} ({_list(amounts)})" for group, amounts in held if amounts]
        rest = {
            name: self.total(name) - self.free(name) - sum(amounts.get(name, 0.0) for _, amounts in held)
            for name in bundle
        }
        others = {name: amount for name, amount in rest.items() if amount > _TOLERANCE}
        text = f"; held by placement groups: {_shorten(each)}" if each else ""
        return text + (f"; held by actors and tasks outside of groups: {_list(others)}" if others else "")


def read_cluster_resources() -> ClusterResources:
    """Read the resources of the cluster to which this process is connected. Blocks."""
    free = free_resources_by_node()
    nodes = [
        NodeResources(
            *(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {})),
            hostname=node["NodeManagerHostname"],
            labels=node.get("Labels") or {},
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    groups = [_read_holding(row) for row in ray.util.placement_group_table().values() if row["state"] == "CREATED"]
    return ClusterResources(nodes, groups)


def can_grow() -> bool:
    """Whether an autoscaler has reported node groups; one that has not cannot be known of. Blocks."""
    return has_autoscaler()


def _read_holding(row: Mapping[str, Any]) -> Reservation:
    amounts: dict[str, float] = {}
    for bundle in row["bundles"].values():
        for name, amount in bundle.items():
            amounts[name] = amounts.get(name, 0.0) + amount
    return Reservation(row["name"] or row["placement_group_id"], amounts)


def _num_in(total: Amounts, bundle: Amounts) -> int:
    return min(math.floor(total.get(name, 0.0) / amount + _TOLERANCE) for name, amount in bundle.items())


def _list(amounts: Amounts) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _shorten(parts: Sequence[str]) -> str:
    more = f"; and {len(parts) - _MOST_LISTED} more" if len(parts) > _MOST_LISTED else ""
    return "; ".join(parts[:_MOST_LISTED]) + more
