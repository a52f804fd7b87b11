"""`NcclTransport`: payloads packed on one GPU, sent over NCCL to the other, and scattered there.

Each connection has a communicator of its own. The giver makes its id and sends it, both ends join when the transport is
opened, and it goes with the connection: a dead peer costs this pair its connection, the next claim makes another.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.workers.transfer.carrier import Claim
from tensorweave.workers.transfer.transports.frame_connection import SILENCE_S, Stream
from tensorweave.workers.transfer.transports.loader import Loader, PoolLoader
from tensorweave.workers.transfer.transports.nccl import Communicator, load_library, new_unique_id
from tensorweave.workers.transfer.transports.transport import GivingTransport, TakingTransport
from tensorweave.workers.transfer.window import PoolWindow

MESSAGE_BYTES: Final = 64 << 20
OPEN_TIMEOUT_S: Final = 20.0
MAX_PAYLOAD_BYTES: Final = 1 << 30
_GIVER, _TAKER = 0, 1
_NUM_STAGINGS: Final = 2
_SIZE: Final = struct.Struct("<Q")


class NcclTransport:
    """Satisfies `TransportKind`, for pools on GPUs. OSError where the library is not there."""

    name = "nccl"

    def __init__(self, window: PoolWindow, message_bytes: int = MESSAGE_BYTES) -> None:
        assert window.device.type == "cuda"
        load_library()
        self._window = window
        self._message_bytes = message_bytes

    def giving(self) -> GivingTransport:
        return _NcclGiving(self._window, self._message_bytes)

    def taking(self) -> TakingTransport:
        return _NcclTaking(self._window)


class _NcclGiving:
    """While one staging is being sent, the next is packed."""

    def __init__(self, window: PoolWindow, message_bytes: int) -> None:
        self.loader: Loader = PoolLoader(window, message_bytes)
        self._device = window.device
        self._stagings: list[Tensor] = []
        self._sent = [torch.cuda.Event() for _ in range(_NUM_STAGINGS)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._stream: Stream | None = None
        self._communicator: Communicator | None = None

    def greeting(self) -> dict[str, Any]:
        return {"gpu": _gpu(self._device)}

    def open(self, stream: Stream) -> None:
        self._stream = stream
        unique_id = new_unique_id()
        stream.send("nccl", unique_id)
        self._communicator = Communicator(unique_id, _GIVER, OPEN_TIMEOUT_S, stream.is_broken)
        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._stagings = [empty] * _NUM_STAGINGS

    def staging(self, num_bytes: int) -> Tensor:
        assert self._communicator is not None
        self._communicator.wait(self._sent[self._turn], SILENCE_S)
        if num_bytes > len(self._stagings[self._turn]):
            self._stagings[self._turn] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._stagings[self._turn]

    def ship(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._stream is not None
        assert self._communicator is not None
        self._stream.send(name, *fields, body=_SIZE.pack(len(payload)))
        if len(payload):
            self._communicator.send(payload, SILENCE_S)
            self._sent[self._turn].record()
            self._turn = (self._turn + 1) % _NUM_STAGINGS

    def probe(self, num_bytes: int) -> None:
        self.ship(self.staging(num_bytes)[:num_bytes], "probe")

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()


class _NcclTaking:
    def __init__(self, window: PoolWindow) -> None:
        self._device = window.device
        self._staging = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._communicator: Communicator | None = None

    def fits(self, greeting: dict[str, Any]) -> bool:
        """NCCL joins no two ranks on one GPU."""
        return greeting.get("gpu") != _gpu(self._device)

    def open(self, stream: Stream) -> None:
        match stream.receive():
            case (["nccl", bytes(unique_id)], 0):
                self._communicator = Communicator(unique_id, _TAKER, OPEN_TIMEOUT_S, stream.is_broken)
            case _:
                raise WireError("a giver over NCCL begins with the communicator's id")

    def land(self, body: Tensor, claim: Claim | None) -> Tensor:
        assert self._communicator is not None
        num_bytes = _payload_bytes(body)
        if num_bytes > len(self._staging):
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        payload = self._staging[:num_bytes]
        if num_bytes:
            self._communicator.receive(payload, SILENCE_S)
            self._arrived.record()
            self._communicator.wait(self._arrived, SILENCE_S)
        return payload

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
