"""`PoolGang`: what a pool needs of a gang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tensorweave.cluster.adapter_registry import AdapterRecord
from tensorweave.cluster.protocol import Adapter, GangAddress, KvSource, LinkMeasurement


class PoolGang(Protocol):
    """`cluster.gang.Gang`, or a fake."""

    gang_id: str

    async def start(self) -> GangAddress: ...

    async def watch(self) -> str: ...

    async def measure_link(self, source: KvSource) -> LinkMeasurement: ...

    async def set_logits_processors(self, processors: Mapping[str, Any]) -> None: ...

    async def load_adapter(self, name: str, path: str) -> Adapter: ...

    async def keep_adapters(self, record: AdapterRecord) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def kill(self) -> None: ...

    def describe(self) -> dict[str, Any]: ...
