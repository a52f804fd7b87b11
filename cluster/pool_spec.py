"""`PoolSpec`: what a pool consists of. `PoolState`: what it publishes. `PoolPlan`: all pools that a service wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.protocol import GangAddress, Role

GangState = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]


@dataclass(frozen=True)
class PoolSpec:
    """After `max_faults` faults within `fault_window_s` a slot has failed: it is started again, but after long pauses.
    Insufficient resources are not a fault."""

    name: str
    gang: GangSpec
    replicas: int = 1
    max_faults: int = 5
    fault_window_s: float = 300.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool publishes to front ends. `failure` is why none of its gangs will be ready soon, if that is so;
    `trouble` is the last problem."""

    name: str
    replicas: int
    addresses: tuple[GangAddress, ...]
    states: tuple[GangState, ...]
    failure: str | None = None
    trouble: str | None = None
    role: Role = "both"


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What a supervisor wants, which every gang keeps for one that takes it over.

    Attributes:
        version: The later plan has the higher one.
        generation: Of the deployment that `specs` are from.
        sizes: How many gangs each pool has now, by name, if that is not its spec's `replicas`.
        config: The deployment's whole configuration as plain data, for whoever manages the service.
    """

    version: int = 0
    generation: int = 0
    specs: tuple[PoolSpec, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
