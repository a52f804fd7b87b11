"""What a gang and its ranks tell each other through Ray: where a rank sits, what it must start, how it fares.

Control only, a few hundred bytes a second; prompts and tokens go over the leader's socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.protocol import KvEndpoint, ModelInfo

_FULL: Final = 0.9
"""A rank that has so much of its descriptors open is replaced before it can open nothing more."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where Ray has put a rank. `created_s` is the process's start time: with the pid it names one process for ever.
    `oom_kills` is how often the kernel of its host had killed for want of memory by then."""

    node_id: str
    pid: int
    created_s: float
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class RankOrder:
    """Everything a rank needs to start. `leader` is rank 0's actor, through which a gang of several finds together.
    `interface_ip` is the address of this rank's node that peers reach it by,
    `transfer_host` the one that other gangs pull KV from. `secret` opens the leader's socket, `kv_secret` the KV
    endpoints: tickets carry it to users."""

    gang_id: str
    place: MeshRank
    args: dict[str, Any]
    leader: Any
    interface_ip: str
    listen_host: str
    transfer_host: str
    num_ranks_here: int
    has_gpu: bool
    start_timeout_s: float
    model_digest: str | None
    secret: str = field(repr=False)
    kv_secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LeaderPlace:
    """Where front ends reach a gang, and what model is there."""

    port: int
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class LinkRate:
    """What the ranks of a gang reach among themselves: a small collective's time, and a large one's rate on each
    link."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """All collectives over a model's tensors so far, as one rank has seen them; `seconds` count waiting."""

    seconds: float = 0.0
    calls: int = 0
    num_bytes: int = 0

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.seconds - before.seconds, self.calls - before.calls, self.num_bytes - before.num_bytes)


@dataclass(frozen=True, slots=True)
class RankStarted:
    """A rank's answer to its order; `leader` is rank 0's. A rank that gives no KV away has no endpoint, a gang of one
    no link."""

    kv_endpoint: KvEndpoint | None
    kv_fingerprint: dict[str, str]
    leader: LeaderPlace | None
    link: LinkRate | None = None


@dataclass(frozen=True, slots=True)
class RankReport:
    """One heartbeat. `progress_age_s` is how long ago the step loop last went round; None before it runs, when `phase`
    says what the rank is at. `num_open_files` of `max_open_files`: the process's descriptors, which strangers'
    connections use up too."""

    progress_age_s: float | None = None
    is_alive: bool = False
    failure: str | None = None
    num_requests: int = 0
    gauges: dict[str, float] = field(default_factory=dict)
    traffic: Traffic | None = None
    num_open_files: int = 0
    max_open_files: int = 0
    phase: str = ""

    @property
    def fault(self) -> str | None:
        """Why the gang must end, if it must."""
        if self.failure is not None:
            return self.failure
        if self.max_open_files and self.num_open_files > _FULL * self.max_open_files:
            return f"it has {self.num_open_files} files and sockets open; {self.max_open_files} are its limit"
        return "its step loop has ended" if self.progress_age_s is not None and not self.is_alive else None

    def standstill(self, hang_timeout_s: float) -> str | None:
        """What to say of a step loop without progress. One such report may only mean that the whole host stood still:
        the loop has had no turn since."""
        if self.progress_age_s is None or self.progress_age_s <= hang_timeout_s:
            return None
        return f"its step loop has stood still for {self.progress_age_s:.1f} s (hang_timeout_s is {hang_timeout_s:g})"


def describe_phases(ranks: Sequence[tuple[str, str]]) -> str:
    """Who is at what while a gang starts: hosts and phases, by rank. Ranks at the same are told together."""
    by_phase: dict[str, list[str]] = {}
    for rank, (host, phase) in enumerate(ranks):
        by_phase.setdefault(phase or "importing", []).append(f"{rank} ({host})")
    return "; ".join(f"rank {', '.join(names)}: {phase}" for phase, names in by_phase.items())
