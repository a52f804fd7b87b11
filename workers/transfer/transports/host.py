"""`HostTransport`: payloads in host memory, sent as bodies of the connection's frames."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.errors import WireError
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlockCursor, PackedCursor, requested_heads
from tensorweave.workers.transfer.transports.frame_connection import FrameConnection
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES, PoolLoader
from tensorweave.workers.transfer.transports.transport import ReceivingTransport, SendingTransport
from tensorweave.workers.transfer.window import PoolWindow, tensor_bytes

_BLOCK_REFERENCE: Final = struct.Struct("<qqq")
_MIN_PIECE_BYTES: Final = 2 << 10
_MAX_PIECES: Final = 960  # a system call takes 1024 pieces, some of which are the frames


class HostTransport:
    """Satisfies `Transport`."""

    name = "tcp"

    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def make_sender(self) -> SendingTransport:
        """Send straight from the pool if the socket can read it and the pieces are large enough to be worth it."""
        return _DirectSender(self._window) if self._is_direct else _StagedSender(self._window)

    def message_blocks(self, num_heads: int) -> int:
        """How many blocks it sends in one message."""
        loader = _ReferenceLoader(self._window) if self._is_direct else PoolLoader(self._window, HOST_MESSAGE_BYTES)
        return loader.message_blocks(num_heads)

    @property
    def _is_direct(self) -> bool:
        return self._window.memory is not None and self._window.plane_bytes >= _MIN_PIECE_BYTES

    def make_receiver(self) -> ReceivingTransport:
        return _HostReceiver(self._window)


class _ReferenceLoader:
    """Payloads are references to blocks: block id, first head and last head of each. The socket reads the blocks."""

    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def block_bytes(self, num_heads: int) -> int:
        return _BLOCK_REFERENCE.size

    def message_blocks(self, num_heads: int) -> int:
        block_bytes = self._window.block_bytes(num_heads)
        return max(1, min(HOST_MESSAGE_BYTES // max(1, block_bytes), _MAX_PIECES // (2 * self._window.num_layers)))

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        references = b"".join(_BLOCK_REFERENCE.pack(i, heads.start, heads.stop) for i in block_ids)
        out.numpy()[:] = np.frombuffer(references, np.uint8)

    def pieces(self, payload: Tensor) -> list[memoryview]:
        references = _BLOCK_REFERENCE.iter_unpack(payload.numpy().tobytes())
        return [piece for i, start, stop in references for piece in self._window.pieces(i, range(start, stop))]


class _DirectSender:
    """Sends from a pool in host memory without a copy. A block may be reused before the socket has read it: its digest
    differs then, as with any other fault."""

    def __init__(self, window: PoolWindow) -> None:
        self._window = window
        self._loader = _ReferenceLoader(window)
        self._connection: FrameConnection | None = None

    def handshake(self) -> dict[str, Any]:
        return {}

    def cursor(self, request: ReadRequest) -> BlockCursor:
        return PackedCursor(request, requested_heads(request, self._window), self._loader)

    def open(self, connection: FrameConnection) -> None:
        self._connection = connection

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._connection is not None
        self._connection.send(name, *fields, body=self._loader.pieces(payload))

    def probe(self, num_bytes: int) -> None:
        assert self._connection is not None
        self._connection.send("probe", body=bytes(num_bytes))

    def close(self) -> None:
        return None


class _StagedSender:
    """Packs blocks into a staging buffer and sends that."""

    def __init__(self, window: PoolWindow) -> None:
        self._loader = PoolLoader(window, HOST_MESSAGE_BYTES)
        self._window = window
        self._staging = window.new_staging(0)
        self._connection: FrameConnection | None = None

    def handshake(self) -> dict[str, Any]:
        return {}

    def cursor(self, request: ReadRequest) -> BlockCursor:
        return PackedCursor(request, requested_heads(request, self._window), self._loader)

    def open(self, connection: FrameConnection) -> None:
        self._connection = connection

    def staging(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._staging):
            self._staging = self._window.new_staging(num_bytes)
        return self._staging

    def send(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._connection is not None
        self._connection.send(name, *fields, body=tensor_bytes(payload))

    def probe(self, num_bytes: int) -> None:
        self.send(torch.zeros(num_bytes, dtype=torch.uint8), "probe")

    def close(self) -> None:
        return None


class _HostReceiver:
    def __init__(self, window: PoolWindow) -> None:
        self._window = window

    def can_reach(self, handshake: dict[str, Any]) -> bool:
        return True

    def open(self, connection: FrameConnection) -> None:
        return None

    def receive(self, body: Tensor, request: ReadRequest | None) -> Tensor:
        """On the pool's device, where digests are computed fastest."""
        return body.to(self._window.device)

    def pull(self, part: BlockPart, request: ReadRequest, sink: BlockSink) -> FinishCopy:
        raise WireError("over TCP the blocks' bytes are sent")

    def close(self) -> None:
        return None
