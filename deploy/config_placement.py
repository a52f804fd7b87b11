"""The table of a pool that says on which hosts its gangs are."""

from __future__ import annotations

import re
from typing import Final

from pydantic import field_validator

from tensorweave.cluster.placement_rule import PlacementRule, Spread
from tensorweave.cluster.strict_model import Field, StrictBaseModel

_LABEL: Final = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_VALUE: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


class PlacementConfig(StrictBaseModel):
    """Where the gangs of a pool are. Default: wherever Ray finds room, a gang on one host if it fits there."""

    nodes: list[str] = Field(
        default_factory=list,
        status="prototype",
        description="Addresses or host names of Ray nodes, as `ray list nodes` shows them. Default: every node.",
    )
    labels: dict[str, str | list[str]] = Field(
        default_factory=dict,
        status="prototype",
        description="Labels that a Ray node must have (`ray start --labels`), each with its value or a list of allowed "
        "values. An autoscaler adds nodes that have them.",
    )
    spread: Spread = Field(
        "none",
        status="prototype",
        description="'gangs': the gangs of the pool on different hosts, as far as there are enough. 'ranks': each rank "
        "of a gang on a host of its own. 'none': as Ray finds room.",
    )

    @field_validator("nodes", mode="before")
    @classmethod
    def _take_one_node(cls, nodes: object) -> object:
        return [nodes] if isinstance(nodes, str) else nodes

    @field_validator("nodes")
    @classmethod
    def _check_nodes(cls, nodes: list[str]) -> list[str]:
        if not all(nodes):
            raise ValueError("a node has no name")
        return nodes

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        for label, given in labels.items():
            if not _LABEL.fullmatch(label):
                raise ValueError(f"{label!r} is no label: letters, digits, '-', '_' and '.', after a prefix with '/'")
            values = [given] if isinstance(given, str) else given
            if wrong := [value for value in values if not _VALUE.fullmatch(value)]:
                raise ValueError(f"{wrong[0]!r} is no value of a label: letters, digits, '-', '_' and '.', at most 63")
            if not values:
                raise ValueError(f"label {label!r} has no value")
        return labels

    def rule(self) -> PlacementRule:
        labels = ((key, (value,) if isinstance(value, str) else tuple(value)) for key, value in self.labels.items())
        return PlacementRule(tuple(self.nodes), tuple(labels), self.spread)
