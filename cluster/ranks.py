"""What a gang and its ranks exchange through Ray: where a rank runs, what it must start, and its heartbeats.

Control messages only, a few hundred bytes per second; prompts and tokens are sent over the leader's socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.protocol import KvEndpoint, ModelInfo
from tensorweave.cluster.tls import TlsFiles

_MAX_OPEN_FILES_SHARE: Final = 0.9
"""A rank with a larger share of its file descriptors open is replaced before it can open no more."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where Ray has placed a rank. `created_s` is the start time of the process, which identifies it together with the
    pid. `oom_kills` is how often the kernel of its host had killed a process for lack of memory by then."""

    node_id: str
    pid: int
    created_s: float
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class RankOrder:
    """Everything a rank needs to start. `leader` is rank 0's actor, through which the ranks find each other.
    `interface_ip` is the address by which the other ranks reach this one, `transfer_host` the one by which other gangs
    do, unless a `transfer_network` is given, in which the rank looks up its own address. Clients of the leader's socket
    show `secret`, readers of KV show `kv_secret`, which is part of tickets."""

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
    transfer_network: str | None = None
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class LeaderPlace:
    """The port of a gang's leader, and its model."""

    port: int
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class LinkRate:
    """The link between the ranks of a gang: the duration of a small collective, and the rate of a large one per
    link."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """All collectives over a model's tensors so far, measured by one rank; `seconds` include waiting."""

    seconds: float = 0.0
    calls: int = 0
    num_bytes: int = 0

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.seconds - before.seconds, self.calls - before.calls, self.num_bytes - before.num_bytes)


@dataclass(frozen=True, slots=True)
class RankStarted:
    """A rank's answer to its order. `leader` is set by rank 0, `kv_endpoint` by ranks that send KV, `link` in gangs of
    several ranks. `durations` has the seconds of each part of the start."""

    kv_endpoint: KvEndpoint | None
    kv_fingerprint: dict[str, str]
    leader: LeaderPlace | None
    link: LinkRate | None = None
    durations: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankReport:
    """One heartbeat. `progress_age_s` is the time since the step loop's last progress; None before it runs, when
    `phase` describes the start. A rank that `waits_for_stage` has none while another pipeline stage computes.
    `num_open_files` of `max_open_files` are the process's descriptors, which connections of strangers use up too."""

    progress_age_s: float | None = None
    waits_for_stage: bool = False
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
        """Why the gang must end; None if it need not."""
        if self.failure is not None:
            return self.failure
        if self.max_open_files and self.num_open_files > _MAX_OPEN_FILES_SHARE * self.max_open_files:
            return f"it has {self.num_open_files} files and sockets open; {self.max_open_files} are its limit"
        return "its step loop has ended" if self.progress_age_s is not None and not self.is_alive else None

    def describe_hang(self, hang_timeout_s: float) -> str | None:
        """Describe a step loop without progress; None if there is progress. A single such report may only mean that the
        whole host was paused."""
        if self.progress_age_s is None or self.progress_age_s <= hang_timeout_s:
            return None
        waiting = ", and waits for another pipeline stage" if self.waits_for_stage else ""
        return (
            f"its step loop has made no progress for {self.progress_age_s:.1f} s (hang_timeout_s is "
            f"{hang_timeout_s:g}){waiting}"
        )


def describe_phases(ranks: Sequence[tuple[str, str]]) -> str:
    """Describe the start of a gang, given host and phase per rank. Ranks in the same phase are listed together."""
    by_phase: dict[str, list[str]] = {}
    for rank, (host, phase) in enumerate(ranks):
        by_phase.setdefault(phase or "importing", []).append(f"{rank} ({host})")
    return "; ".join(f"rank {', '.join(names)}: {phase}" for phase, names in by_phase.items())


def describe_durations(started: Sequence[RankStarted]) -> str:
    """The durations of the rank that took longest: 'importing 1.2 s, loading the weights 3.4 s'."""
    slowest = max((rank.durations for rank in started), key=lambda durations: sum(durations.values()))
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest.items())
