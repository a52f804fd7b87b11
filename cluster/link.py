"""How a front end reaches a gang: `GangLink`. `cluster.socket_link` speaks to a leader's socket, `workers.local` to an
executor in this process. Links live on one event loop and are not thread-safe."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.cluster.protocol import GenerateRequest, KvSource, LinkMeasurement, ModelInfo, TokenChunk


@dataclass(frozen=True, slots=True)
class FoundAttempt:
    """An attempt whose router was lost: its name at the gang, and the seed that it samples with."""

    request_id: str
    seed: int


class GangLink(Protocol):
    """One gang as the dispatcher sees it."""

    @property
    def gang_id(self) -> str: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def num_inflight(self) -> int: ...

    @property
    def is_open(self) -> bool: ...

    @property
    def is_quiet(self) -> bool:
        """Nothing has been heard of the gang for longer than it is ever silent: better give new work to others."""

    @property
    def kv(self) -> KvMirror:
        """Which KV blocks the gang holds."""

    @property
    def kv_source(self) -> KvSource | None:
        """Where other gangs get its KV; None where it gives none away."""

    @property
    def kv_links(self) -> Mapping[str, LinkMeasurement]:
        """What the link from each prefill gang was measured to carry, by its id; not in: those that carry nothing."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks until the last one; raises the tree's errors. Leaving early cancels the request at the gang."""

    def cancel(self, request_id: str) -> None:
        """End this request at the gang if it runs there, and the lease on its KV if it has ended on offer."""

    async def find(self, request_id: str, timeout_s: float = 5.0) -> FoundAttempt | None:
        """An attempt of this request (its id, or id/anything) that was given a `grace_s`, runs or has ended there, and
        that no connection hears any more. Raises WorkerLost."""

    def attach(self, request_id: str) -> AsyncGenerator[TokenChunk, None]:
        """All of the answer of a found attempt so far, what it took over from an earlier one first, then the rest, as
        from `generate`. NotReady: it is gone, or another router has attached to it."""

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The executor's iteration stats since they were last asked for, by whomever."""

    async def kv_events(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The KV events that the gang has kept since they were last asked for, by whomever."""

    def close(self) -> None:
        """Idempotent; open requests get `WorkerLost`."""
