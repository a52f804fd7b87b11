"""`SameNodeTransport`: the receiver reads the sender's KV pool itself, over NVLink or PCIe, by CUDA IPC.

The sender sends block ids; the receiver, which has mapped the sender's pool, gathers those blocks into its own GPU's
memory in one kernel. No rank writes into another's memory. The sender does not know when a read is over, so a block may
have been reused meanwhile: its digest differs then, as with any other fault. Mapped memory outlives its owner: if the
sender is killed, the read in flight ends, and the mapping is removed with the connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import WireError
from tensorweave.kernels.blocks.operations import choose_block_operations
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.block_sink import BlockSink, FinishCopy
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import BlockCursor, PackedCursor, requested_heads
from tensorweave.workers.transfer.transports.cuda_ipc import CudaIpc
from tensorweave.workers.transfer.transports.frame_connection import FrameConnection
from tensorweave.workers.transfer.transports.transport import ReceivingTransport, SendingTransport
from tensorweave.workers.transfer.window import PoolWindow, tensor_bytes

MESSAGE_BYTES: Final = 64 << 20
_BLOCK_ID_BYTES: Final = 8


class SameNodeTransport:
    """Satisfies `Transport`, for pools on GPUs."""

    name = "ipc"

    def __init__(self, window: PoolWindow, message_bytes: int = MESSAGE_BYTES) -> None:
        assert window.device.type == "cuda"
        self._window = window
        self._message_bytes = message_bytes
        self._handshake: dict[str, Any] | None = None

    def make_sender(self) -> SendingTransport:
        if self._handshake is None:
            self._handshake = {**CudaIpc().share(self._window), "first_head": self._window.heads.start}
        return _SameNodeSender(self._window, self._handshake, self._message_bytes)

    def make_receiver(self) -> ReceivingTransport:
        return _SameNodeReceiver(self._window)


class BlockIdLoader:
    """Payloads are block ids, in host memory."""

    def __init__(self, window: PoolWindow, message_bytes: int) -> None:
        self._window = window
        self._message_bytes = message_bytes

    def block_bytes(self, num_heads: int) -> int:
        return _BLOCK_ID_BYTES

    def message_blocks(self, num_heads: int) -> int:
        return max(1, self._message_bytes // max(1, self._window.block_bytes(num_heads)))

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        out.numpy().view("<i8")[:] = block_ids


class _SameNodeSender:
    def __init__(self, window: PoolWindow, handshake: dict[str, Any], message_bytes: int) -> None:
        self._loader = BlockIdLoader(window, message_bytes)
        self._window = window
        self._handshake = handshake
        self._connection: FrameConnection | None = None

    def handshake(self) -> dict[str, Any]:
        return self._handshake

    def cursor(self, request: ReadRequest) -> BlockCursor:
        return PackedCursor(request, requested_heads(request, self._window), self._loader)

    def open(self, connection: FrameConnection) -> None:
        self._connection = connection

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def send(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._connection is not None
        self._connection.send(name, *fields, body=tensor_bytes(payload))

    def probe(self, num_bytes: int) -> None:
        """The receiver reads any blocks and discards them."""
        num_blocks = min(-(-num_bytes // self._window.block_bytes(len(self._window.heads))), self._window.num_blocks)
        block_ids = self.staging(num_blocks * _BLOCK_ID_BYTES)
        self._loader.pack(range(num_blocks), self._window.heads, block_ids)
        self.send(block_ids, "probe")

    def close(self) -> None:
        return None


class _SameNodeReceiver:
    def __init__(self, window: PoolWindow) -> None:
        self._window = window
        self._device = window.device
        self._pool_LB2KPH: Tensor | None = None
        self._first_head = 0
        self._staging = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._gathered = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def can_reach(self, handshake: dict[str, Any]) -> bool:
        try:
            self._pool_LB2KPH = CudaIpc().map(handshake, self._window)
            if self._pool_LB2KPH is None:
                return False
            self._first_head = int(handshake["first_head"])
            probe = self._gather([0], range(1))
            self._gathered.synchronize()
        except (RuntimeError, KeyError, TypeError, ValueError):  # no peer access, the same process, another namespace
            self._pool_LB2KPH = None
            return False
        return len(probe) > 0

    def open(self, connection: FrameConnection) -> None:
        return None

    def receive(self, body: Tensor, request: ReadRequest | None) -> Tensor:
        pool = self._pool_LB2KPH
        assert pool is not None
        block_ids = body.numpy().view("<i8").tolist() if len(body) % _BLOCK_ID_BYTES == 0 else [-1]
        heads = range(pool.shape[3])
        if request is not None:
            first_head = request.first_head - self._first_head
            heads = range(first_head, first_head + request.num_heads)
        if not (0 <= heads.start <= heads.stop <= pool.shape[3]):
            raise WireError("the sender does not hold these heads")
        if any(not 0 <= block_id < pool.shape[1] for block_id in block_ids):
            raise WireError("the sender's pool has no such blocks")
        payload = self._gather(block_ids, heads)
        self._gathered.synchronize()
        return payload

    def pull(self, part: BlockPart, request: ReadRequest, sink: BlockSink) -> FinishCopy:
        raise WireError("blocks are gathered by their numbers")

    def close(self) -> None:
        self._pool_LB2KPH = None

    def _gather(self, block_ids: Sequence[int], heads: range) -> Tensor:
        pool = self._pool_LB2KPH
        assert pool is not None
        num_layers, _, _, _, P, H = pool.shape
        num_bytes = len(block_ids) * num_layers * 2 * len(heads) * P * H * pool.itemsize
        if num_bytes > len(self._staging):
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        payload = self._staging[:num_bytes]
        choose_block_operations(pool).pack(pool, block_ids, heads, payload)
        self._gathered.record()
        return payload
