"""`GangLink`: how a front end reaches a gang. `cluster.socket_link` connects to a leader's socket, `LocalLink` to an
executor in this process. Links are used on one event loop and are not thread-safe."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.cluster.protocol import GenerateRequest, KvSource, LinkMeasurement, ModelInfo, TokenChunk


@dataclass(frozen=True, slots=True)
class FoundAttempt:
    """An attempt whose router was lost: its id at the gang, and its sampling seed."""

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
        """The gang has been silent for longer than usual; others should get new requests."""

    @property
    def kv(self) -> KvMirror:
        """Which KV blocks the gang holds."""

    @property
    def kv_source(self) -> KvSource | None:
        """Where other gangs fetch its KV; None if it sends none."""

    @property
    def kv_links(self) -> Mapping[str, LinkMeasurement]:
        """The measured link from each prefill gang, by the gang's id, except links that cannot be used."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Yield chunks until the last one. Raises TensorweaveError. Leaving early cancels the request at the gang."""

    def cancel(self, request_id: str) -> None:
        """Cancel this request at the gang if it is running, and end the lease on its KV if it has ended on offer."""

    async def find(self, request_id: str, timeout_s: float = 5.0) -> FoundAttempt | None:
        """Find an attempt of this request (its id, or id/anything) with a `grace_s` that runs or has ended there, and
        whose connection has broken. Raises WorkerLost."""

    def attach(self, request_id: str) -> AsyncGenerator[TokenChunk, None]:
        """Yield all of a found attempt's answer so far, beginning with what it resumed from an earlier attempt, then
        the rest, as `generate` does. Raises NotReady if it is not there, or another router has attached to it."""

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The executor's iteration stats since the last call, of any client."""

    async def kv_events(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The KV events that the gang has kept since the last call, of any client."""

    def close(self) -> None:
        """Idempotent; open requests get `WorkerLost`."""
