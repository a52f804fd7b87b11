"""`NcclTransport`: payloads are packed on one GPU, sent over NCCL to the other, and unpacked there.

Each connection has a communicator of its own. The sender makes its id and sends it, both ends join when the transport
is opened, and it is aborted with the connection: a dead peer costs this pair its connection, the next read opens
another.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlockCursor, PackedCursor, requested_heads
from tensorweave.workers.transfer.transports.frame_connection import SILENCE_S, FrameConnection
from tensorweave.workers.transfer.transports.loader import PoolLoader
from tensorweave.workers.transfer.transports.nccl import Communicator, load_library, new_unique_id
from tensorweave.workers.transfer.transports.transport import ReceivingTransport, SendingTransport
from tensorweave.workers.transfer.window import PoolWindow

MESSAGE_BYTES: Final = 64 << 20
OPEN_TIMEOUT_S: Final = 20.0
MAX_PAYLOAD_BYTES: Final = 1 << 30
_SENDER, _RECEIVER = 0, 1
_NUM_STAGINGS: Final = 2
_SIZE: Final = struct.Struct("<Q")


class NcclTransport:
    """Satisfies `Transport`, for pools on GPUs. Raises OSError if NCCL is not installed."""

    name = "nccl"

    def __init__(self, window: PoolWindow, message_bytes: int = MESSAGE_BYTES) -> None:
        assert window.device.type == "cuda"
        load_library()
        self._window = window
        self._message_bytes = message_bytes

    def make_sender(self) -> SendingTransport:
        return _NcclSender(self._window, self._message_bytes)

    def make_receiver(self) -> ReceivingTransport:
        return _NcclReceiver(self._window)


class _NcclSender:
    """Packs the next staging buffer while the last one is being sent."""

    def __init__(self, window: PoolWindow, message_bytes: int) -> None:
        self._window = window
        self._loader = PoolLoader(window, message_bytes)
        self._device = window.device
        self._stagings: list[Tensor] = []
        self._sent = [torch.cuda.Event() for _ in range(_NUM_STAGINGS)]  # type: ignore[no-untyped-call]
        self._current = 0
        self._connection: FrameConnection | None = None
        self._communicator: Communicator | None = None

    def handshake(self) -> dict[str, Any]:
        return {"gpu": _gpu(self._device)}

    def cursor(self, request: ReadRequest) -> BlockCursor:
        return PackedCursor(request, requested_heads(request, self._window), self._loader)

    def open(self, connection: FrameConnection) -> None:
        self._connection = connection
        unique_id = new_unique_id()
        connection.send("nccl", unique_id)
        self._communicator = Communicator(unique_id, _SENDER, OPEN_TIMEOUT_S, connection.is_broken)
        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._stagings = [empty] * _NUM_STAGINGS

    def staging(self, num_bytes: int) -> Tensor:
        assert self._communicator is not None
        self._communicator.wait(self._sent[self._current], SILENCE_S)
        if num_bytes > len(self._stagings[self._current]):
            self._stagings[self._current] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._stagings[self._current]

    def send(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._connection is not None
        assert self._communicator is not None
        self._connection.send(name, *fields, body=_SIZE.pack(len(payload)))
        if len(payload):
            self._communicator.send(payload, SILENCE_S)
            self._sent[self._current].record()
            self._current = (self._current + 1) % _NUM_STAGINGS

    def probe(self, num_bytes: int) -> None:
        self.send(self.staging(num_bytes)[:num_bytes], "probe")

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()


class _NcclReceiver:
    def __init__(self, window: PoolWindow) -> None:
        self._device = window.device
        self._staging = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._received = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._communicator: Communicator | None = None

    def can_reach(self, handshake: dict[str, Any]) -> bool:
        """NCCL cannot connect two ranks on one GPU."""
        return handshake.get("gpu") != _gpu(self._device)

    def open(self, connection: FrameConnection) -> None:
        match connection.receive():
            case (["nccl", bytes(unique_id)], 0):
                self._communicator = Communicator(unique_id, _RECEIVER, OPEN_TIMEOUT_S, connection.is_broken)
            case _:
                raise WireError("a sender over NCCL begins with the communicator's id")

    def receive(self, body: Tensor, request: ReadRequest | None) -> Tensor:
        assert self._communicator is not None
        num_bytes = _payload_bytes(body)
        if num_bytes > len(self._staging):
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        payload = self._staging[:num_bytes]
        if num_bytes:
            self._communicator.receive(payload, SILENCE_S)
            self._received.record()
            self._communicator.wait(self._received, SILENCE_S)
        return payload

    def pull(self, part: BlockPart, request: ReadRequest, sink: BlockSink) -> FinishCopy:
        raise WireError("over NCCL the blocks' bytes are sent")

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()


def _payload_bytes(body: Tensor) -> int:
    if len(body) != _SIZE.size:
        raise WireError("a payload over NCCL is announced by its size")
    num_bytes = int(_SIZE.unpack(body.numpy().tobytes())[0])
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise TransferFailed(f"a payload of {num_bytes} bytes is over the limit")
    return num_bytes


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
