"""Transports move payloads between two ranks, beside their control connection; `HostTransport` is that connection.

A giver says which transports it has, the taker picks one, both open it; from then on every payload takes it, in the
order of the frames that announce them. A transport moves bytes only: claims, digests and silence are the connection's.
`workers.transfer.nccl_transport` and `workers.transfer.same_node` have the transports of GPUs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from tensorweave.workers.transfer.carrier import Claim
from tensorweave.workers.transfer.transports.frame_connection import Stream, tensor_bytes
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES, Loader, PoolLoader
from tensorweave.workers.transfer.window import PoolWindow

_PLACE: Final = struct.Struct("<qqq")
_MIN_PIECE_BYTES: Final = 2 << 10
_MAX_PIECES: Final = 960  # a call takes 1024 pieces, some of them are the frames


class GivingTransport(Protocol):
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


class TakingTransport(Protocol):
    """The taker's end. All on one thread."""

    def fits(self, greeting: dict[str, Any]) -> bool:
        """Whether this transport can lead to the giver with this greeting."""

    def open(self, stream: Stream) -> None:
        """Raises TransferFailed."""

    def land(self, body: Tensor, claim: Claim | None) -> Tensor:
        """The payload that a frame with this body announced, good until the next call. None: of a probe, or of a claim
        that has been closed. Raises TransferFailed."""

    def close(self) -> None: ...


class TransportKind(Protocol):
    name: str

    def giving(self) -> GivingTransport: ...

    def taking(self) -> TakingTransport: ...


class HostTransport:
    """Payloads in host memory, as bodies of frames. A `TransportKind`, and the maker of both ends."""

    name = "tcp"

    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def giving(self) -> GivingTransport:
        """Straight from the pool where the socket can read it and the pieces are worth their place in a call."""
        is_whole = self._window.memory is not None and self._window.plane_bytes >= _MIN_PIECE_BYTES
        return _PlaceGiving(self._window) if is_whole else _HostGiving(self._window)

    def taking(self) -> TakingTransport:
        return _HostTaking(self._window)


class PlaceLoader:
    """Payloads say where the blocks are: number, first head and last head of each. The socket reads them there."""

    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def block_bytes(self, num_heads: int) -> int:
        return _PLACE.size

    def message_blocks(self, num_heads: int) -> int:
        block_bytes = self._window.block_bytes(num_heads)
        return max(1, min(HOST_MESSAGE_BYTES // max(1, block_bytes), _MAX_PIECES // (2 * self._window.num_layers)))

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        out.numpy()[:] = np.frombuffer(b"".join(_PLACE.pack(i, heads.start, heads.stop) for i in block_ids), np.uint8)

    def pieces(self, payload: Tensor) -> list[memoryview]:
        places = _PLACE.iter_unpack(payload.numpy().tobytes())
        return [piece for i, start, stop in places for piece in self._window.pieces(i, range(start, stop))]


class _PlaceGiving:
    """From a pool in host memory, without a copy of ours. A block may be given to someone else before the socket has
    read it: its digest then differs, as with any other fault."""

    def __init__(self, window: PoolWindow) -> None:
        self.loader: Loader = (loader := PlaceLoader(window))
        self._pieces = loader.pieces
        self._stream: Stream | None = None

    def greeting(self) -> dict[str, Any]:
        return {}

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def ship(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._stream is not None
        self._stream.send(name, *fields, body=self._pieces(payload))

    def probe(self, num_bytes: int) -> None:
        assert self._stream is not None
        self._stream.send("probe", body=bytes(num_bytes))

    def close(self) -> None:
        return None


class _HostGiving:
    def __init__(self, window: PoolWindow) -> None:
        self.loader: Loader = PoolLoader(window, HOST_MESSAGE_BYTES)
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
