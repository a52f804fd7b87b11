"""`DirectTransport`: the receiver reads the sender's KV pool itself, over NVLink or PCIe, by CUDA IPC, without a buffer
in between. It is used only where `cache_transceiver_config.backend` names it.

The sender sends where blocks lie, layer by layer as they are computed; the receiver, which has mapped the sender's
pool, copies them straight into its own blocks, with digests on the way (`kernels/blocks/pull.cu`), and goes on
receiving meanwhile. No rank writes into another's memory. The sender does not know when a read is over, so a block may
have been reused meanwhile: its digest differs then, as with any other fault, and it is not used. If the sender is
killed, the copy in flight ends, and the mapping is removed with the connection.
"""

from __future__ import annotations

import struct
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from tensorweave.cluster.errors import TransferFailed, WireError
from tensorweave.kernels.blocks.reference import SomeBlocks
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.expected_rate import DIRECT
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlockCursor, PartCursor, requested_heads
from tensorweave.workers.transfer.transports.cuda_ipc import CudaIpc
from tensorweave.workers.transfer.transports.frame_connection import FrameConnection
from tensorweave.workers.transfer.transports.transport import ReceivingTransport, SendingTransport
from tensorweave.workers.transfer.window import PoolWindow

MESSAGE_BYTES: Final = 1 << 30
"""A message has only where blocks lie, and digests; each costs the receiver's host as much as a copy of 64 MB."""
_PROBE: Final = struct.Struct("<Q")
_MAX_PROBED_BLOCKS: Final = 256


class PeerMemory(Protocol):
    """How a process reads another one's pool."""

    def share(self, window: PoolWindow) -> dict[str, Any]:
        """What others must know to read this pool; plain values."""

    def map(self, handshake: dict[str, Any], window: PoolWindow) -> Tensor | None:
        """The pool [L, B, 2, K, P, H] behind the handshake, for `window`'s device; None if it is out of reach. Raises
        RuntimeError, KeyError, TypeError or ValueError if the handshake is of no use."""


class DirectTransport:
    """Satisfies `Transport`."""

    name = DIRECT

    def __init__(
        self, window: PoolWindow, message_bytes: int = MESSAGE_BYTES, memory: PeerMemory | None = None
    ) -> None:
        assert memory is not None or window.device.type == "cuda"
        self._window = window
        self._message_bytes = message_bytes
        self._memory = memory or CudaIpc()
        self._handshake: dict[str, Any] | None = None

    def make_sender(self) -> SendingTransport:
        if self._handshake is None:
            self._handshake = {**self._memory.share(self._window), "first_head": self._window.heads.start}
        return _DirectSender(self._window, self._handshake, self._message_bytes)

    def make_receiver(self) -> ReceivingTransport:
        return _DirectReceiver(self._window, self._memory)


class _DirectSender:
    def __init__(self, window: PoolWindow, handshake: dict[str, Any], message_bytes: int) -> None:
        self._window = window
        self._handshake = handshake
        self._message_bytes = message_bytes
        self._connection: FrameConnection | None = None

    def handshake(self) -> dict[str, Any]:
        return self._handshake

    def cursor(self, request: ReadRequest) -> BlockCursor:
        return PartCursor(request, requested_heads(request, self._window), self._window, self._message_bytes)

    def open(self, connection: FrameConnection) -> None:
        self._connection = connection

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, payload: Tensor, name: str, *fields: Any) -> None:
        raise AssertionError("only parts are sent")

    def probe(self, num_bytes: int) -> None:
        """The receiver reads as many bytes of any blocks."""
        assert self._connection is not None
        self._connection.send("probe", body=_PROBE.pack(num_bytes))

    def close(self) -> None:
        return None


class _DirectReceiver:
    def __init__(self, window: PoolWindow, memory: PeerMemory) -> None:
        self._window = window
        self._memory = memory
        self._pool_LB2KPH: Tensor | None = None
        self._first_head = 0

    def can_reach(self, handshake: dict[str, Any]) -> bool:
        try:
            self._pool_LB2KPH = self._memory.map(handshake, self._window)
            self._first_head = int(handshake["first_head"])
            if self._pool_LB2KPH is not None:
                self._read_any(1)
        except (RuntimeError, KeyError, TypeError, ValueError):  # no peer access, the same process, another namespace
            self._pool_LB2KPH = None
        return self._pool_LB2KPH is not None

    def open(self, connection: FrameConnection) -> None:
        return None

    def receive(self, body: Tensor, request: ReadRequest | None) -> Tensor:
        if request is not None or len(body) != _PROBE.size:
            raise WireError("only parts are sent, which are copied directly")
        self._read_any(int(_PROBE.unpack(body.numpy().tobytes())[0]))
        return body

    def pull(self, part: BlockPart, request: ReadRequest, sink: BlockSink) -> FinishCopy:
        pool = self._pool_LB2KPH
        assert pool is not None
        num_layers, num_blocks, _, num_heads, _, _ = pool.shape
        first = request.first_head - self._first_head
        heads = range(first, first + request.num_heads)
        if not (0 <= heads.start <= heads.stop <= num_heads):
            raise WireError("the sender does not hold these heads")
        ids = part.rows_N5[:, 3]
        if ids.min() < 0 or ids.max() >= num_blocks or not (0 <= part.layers.start < part.layers.stop <= num_layers):
            raise WireError("the sender's pool has no such blocks")
        try:
            return sink.pull(part, pool, heads)
        except RuntimeError as error:
            raise TransferFailed(f"a copy from the sender's GPU failed: {error}") from None

    def close(self) -> None:
        self._pool_LB2KPH = None

    def _read_any(self, num_bytes: int) -> None:
        """Copy blocks of the sender's, at least one, into memory of no use."""
        pool = self._pool_LB2KPH
        assert pool is not None
        num_layers, num_blocks, _, num_heads, P, H = pool.shape
        layer_bytes = pool[0, 0].nbytes
        num_rounds, count = 1, min(-(-num_bytes // layer_bytes), num_blocks, _MAX_PROBED_BLOCKS) or 1
        num_rounds = max(1, num_bytes // (count * layer_bytes))
        target = PoolWindow(
            KVPool(1, count, num_heads, P, H, pool.dtype, self._window.device), self._window.copy_sms, is_direct=True
        )
        heads, ids = range(num_heads), range(count)
        copies = [
            target.pull(SomeBlocks(pool[layer : layer + 1], ids, heads), ids, heads, [P] * count, range(1))
            for layer in (number % num_layers for number in range(num_rounds))
        ]
        for copy in copies:
            copy.wait()
