"""Lanes: the way that payloads take beside the control connection of two ranks, and `HostLane`, the connection itself.

A giver says which lanes it has, the taker picks one, both open it; from then on every payload takes it, in the order
of the frames that announce them. A lane moves bytes and nothing else: claims, digests and silence are the connection's.
`workers.transfer.nccl_lane` and `workers.transfer.same_node` have the lanes of GPUs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tensorweave.workers.transfer.carrier import Claim
from tensorweave.workers.transfer.loader import HOST_PARCEL_BYTES, Loader, PoolLoader
from tensorweave.workers.transfer.stream import Stream, tensor_bytes
from tensorweave.workers.transfer.window import PoolWindow


class GivingLane(Protocol):
    """The giver's end. All but `greeting` on one thread."""

    loader: Loader

    def greeting(self) -> dict[str, Any]:
        """What the taker's end must know; plain values."""

    def open(self, stream: Stream) -> None:
        """Raises TransferFailed."""

    def staging(self, num_bytes: int) -> Tensor:
        """Memory for the next payload, which may be written now."""

    def ship(self, payload: Tensor, name: str, *fields: Any) -> None:
        """Send the frame and the payload, a part of the last `staging`. Raises TransferFailed."""

    def probe(self, num_bytes: int) -> None:
        """Send a "probe" frame and a payload that brings about so many bytes to the taker, of no meaning."""

    def close(self) -> None: ...


class TakingLane(Protocol):
    """The taker's end. All on one thread."""

    def fits(self, greeting: dict[str, Any]) -> bool:
        """Whether this lane can lead to the giver with this greeting."""

    def open(self, stream: Stream) -> None:
        """Raises TransferFailed."""

    def land(self, body: Tensor, claim: Claim | None) -> Tensor:
        """The payload that a frame with this body announced, good until the next call. None: of a probe, or of a claim
        that has been closed. Raises TransferFailed."""

    def close(self) -> None: ...


class LaneKind(Protocol):
    name: str

    def giving(self) -> GivingLane: ...

    def taking(self) -> TakingLane: ...


class HostLane:
    """Payloads in host memory, as bodies of frames. A `LaneKind`, and the maker of both ends."""

    name = "tcp"

    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def giving(self) -> GivingLane:
        return _HostGiving(self._window)

    def taking(self) -> TakingLane:
        return _HostTaking(self._window)


class _HostGiving:
    def __init__(self, window: PoolWindow) -> None:
        self.loader: Loader = PoolLoader(window, HOST_PARCEL_BYTES)
        self._window = window
        self._staging = window.new_staging(0)
        self._stream: Stream | None = None

    def greeting(self) -> dict[str, Any]:
        return {}

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def staging(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._staging):
            self._staging = self._window.new_staging(num_bytes)
        return self._staging

    def ship(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._stream is not None
        self._stream.send(name, *fields, body=tensor_bytes(payload))

    def probe(self, num_bytes: int) -> None:
        self.ship(torch.zeros(num_bytes, dtype=torch.uint8), "probe")

    def close(self) -> None:
        return None


class _HostTaking:
    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def fits(self, greeting: dict[str, Any]) -> bool:
        return True

    def open(self, stream: Stream) -> None:
        return None

    def land(self, body: Tensor, claim: Claim | None) -> Tensor:
        """On the pool's device, where digests are quickest."""
        return body.to(self._window.device)

    def close(self) -> None:
        return None
