"""`Transport`: how payloads move between two ranks, beside the connection that carries their frames.

A sender lists its transports, the receiver picks one, both open it; from then on every payload takes it, in the order
of the frames that announce them. A transport moves bytes only: reads, digests and timeouts belong to the connection.
`transports.host` uses the connection itself; `transports.nccl_transport` and `transports.same_node` are for GPUs.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlockCursor
from tensorweave.workers.transfer.transports.frame_connection import FrameConnection


class SendingTransport(Protocol):
    """The sender's end. All calls but `handshake` and `cursor` on one thread."""

    def cursor(self, request: ReadRequest) -> BlockCursor:
        """What this read is sent: payloads, or parts, which `ReceivingTransport.pull` understands."""

    def handshake(self) -> dict[str, Any]:
        """What the receiver's end must know; plain values."""

    def open(self, connection: FrameConnection) -> None:
        """Raises TransferFailed."""

    def staging(self, num_bytes: int) -> Tensor:
        """Memory for the next payload, which may be written now."""

    def send(self, payload: Tensor, name: str, *fields: Any) -> None:
        """Send the frame and the payload, which is a part of the last `staging`. Raises TransferFailed."""

    def probe(self, num_bytes: int) -> None:
        """Send a "probe" frame and a meaningless payload of about `num_bytes`."""

    def close(self) -> None: ...


class ReceivingTransport(Protocol):
    """The receiver's end. All calls on one thread."""

    def can_reach(self, handshake: dict[str, Any]) -> bool:
        """Whether this transport reaches the sender with this handshake."""

    def open(self, connection: FrameConnection) -> None:
        """Raises TransferFailed."""

    def receive(self, body: Tensor, request: ReadRequest | None) -> Tensor:
        """Return the payload that a frame with this body announced; it is valid until the next call. `request` is None
        for a probe and for a read that has been closed. Raises TransferFailed."""

    def pull(self, part: BlockPart, request: ReadRequest, sink: BlockSink) -> FinishCopy:
        """Let the sink copy these blocks from where they lie. Raises WireError if the sender does not hold them."""

    def close(self) -> None: ...


class Transport(Protocol):
    name: str

    def make_sender(self) -> SendingTransport: ...

    def make_receiver(self) -> ReceivingTransport: ...
