"""`PlacementRule`: on which nodes of the Ray cluster a pool's gangs may be, and how they are spread over them.
`PoolPlaces`: where a pool's gangs go while several are placed at once."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

Spread = Literal["none", "gangs", "ranks"]

NODE_ID_LABEL: Final = "ray.io/node-id"
"""Ray's own label of each node."""


@dataclass(frozen=True, slots=True)
class NodeName:
    """What a rule may know a node by."""

    node_id: str
    address: str = ""
    hostname: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacementRule:
    """`nodes` are addresses or host names as Ray knows them; `labels` are labels of Ray nodes, each with its
    values. Empty ones allow every node. `spread`: 'gangs' places the gangs of a pool on different nodes as far as
    there are enough, 'ranks' each rank of a gang on a node of its own."""

    nodes: tuple[str, ...] = ()
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    spread: Spread = "none"

    @property
    def is_free(self) -> bool:
        """Whether every node is allowed."""
        return not self.nodes and not self.labels

    def allows(self, node: NodeName) -> bool:
        is_named = not self.nodes or node.address in self.nodes or node.hostname in self.nodes
        return is_named and all(node.labels.get(label) in values for label, values in self.labels)

    def selector(self, node_ids: Iterable[str] | None = None) -> dict[str, str]:
        """Ray's label selector for a bundle: the rule's labels, and one of `node_ids` if they are given. An autoscaler
        adds nodes with the labels."""
        selector = {label: _one_of(values) for label, values in self.labels}
        return selector if node_ids is None else {**selector, NODE_ID_LABEL: _one_of(sorted(node_ids))}

    def describe(self) -> str:
        parts = [f"placement.nodes ({', '.join(self.nodes)})"] if self.nodes else []
        if self.labels:
            pairs = ", ".join(f"{label}: {' or '.join(values)}" for label, values in self.labels)
            parts.append(f"placement.labels ({pairs})")
        return " and ".join(parts)


@dataclass(slots=True)
class PoolPlaces:
    """The nodes on which a pool's gangs are, and those on which it is placing some at the moment. `prefix` is that of
    the names of its placement groups."""

    prefix: str
    rule: PlacementRule = field(default_factory=PlacementRule)
    _claimed: list[str] = field(default_factory=list)

    @contextmanager
    def claim_one(self, candidates: Sequence[str], placed: Sequence[str]) -> Iterator[str | None]:
        """The candidate with the fewest gangs, which counts as one more until the end of the context."""
        num_gangs = collections.Counter((*placed, *self._claimed))
        chosen = min(candidates, key=lambda node_id: num_gangs[node_id], default=None)
        claimed = [] if chosen is None else [chosen]
        self._claimed += claimed
        try:
            yield chosen
        finally:
            for node_id in claimed:
                self._claimed.remove(node_id)


def _one_of(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"in({','.join(values)})"
