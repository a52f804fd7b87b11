"""Communication among the ranks of a gang: one agreement per step, the tensor-parallel collectives, and the link
between pipeline stages (`stages`).

`Comm` is what the executor and the model see. `SoloComm` is its Null object for one rank; `GroupComm` uses
torch.distributed: NCCL for tensors on GPUs, gloo for tensors on CPUs and for all agreements. If a peer dies or is
silent, `WorkerLost` is raised.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.ranks import Traffic
from tensorweave.workers.gang.gloo_listeners import closing_listeners
from tensorweave.workers.gang.host_channel import HostChannel, open_host_channel
from tensorweave.workers.gang.rank_store import RankStore
from tensorweave.workers.gang.stages import GroupStageLink, OneStage, StageLink

_INLINE_BYTES = 4096
_LENGTH_BYTES = 8


class Comm(Protocol):
    """`place` names this rank; `rank` and `size` are its number in the gang and the number of ranks. `stages` connects
    it to other pipeline stages; sums and gathers are those of its own stage.

    Every rank must make the same calls in the same order.
    """

    place: MeshRank
    rank: int
    size: int
    stages: StageLink

    def agree(self, message: bytes | None) -> bytes:
        """Return rank 0's `message` on every rank; the others pass None."""

    def agree_min(self, value: int) -> int:
        """Return the smallest of all ranks' values."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of this stage, in place. Every rank gets the same bits."""

    def gather_columns(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Return [R, sum(sizes)]: the [R, sizes[i]] of each rank of this stage side by side, on all of them."""

    def close(self) -> None:
        """Leave the group. No call may follow."""


class SoloComm:
    """One rank: agreements and sums return their argument."""

    place = MeshRank()
    rank = 0
    size = 1
    stages: StageLink = OneStage()

    def agree(self, message: bytes | None) -> bytes:
        assert message is not None, "rank 0 always has a message"
        return message

    def agree_min(self, value: int) -> int:
        return value

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_columns(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return tensor

    def close(self) -> None:
        return None


class GroupComm:
    """The ranks of one gang over torch.distributed.

    An agreement goes through the host's memory where all ranks are on one host (`host_channel`). Else it is one gloo
    broadcast of a fixed buffer: 8 bytes of length, then the message. What does not fit follows in a second broadcast.
    `tensors` is the group of the rank's stage, None where that is one rank.
    """

    def __init__(
        self,
        place: MeshRank,
        tensors: dist.ProcessGroup | None,
        control: dist.ProcessGroup,
        store: RankStore,
        stages: StageLink,
    ) -> None:
        self.place = place
        self.stages = stages
        self.rank = place.rank
        self.size = place.mesh.size
        self._store = store  # torch keeps only its C++ part alive, and calls the Python part
        self._tensors = tensors
        self._control = control
        self._inline = torch.zeros(_INLINE_BYTES, dtype=torch.uint8)
        self._channel: HostChannel | None = None
        self.traffic = Traffic()
        """Of `all_reduce` and `gather_columns`. Any thread may read it."""

    def open_channel(self, timeout_s: float) -> None:
        """Use a channel of the host for agreements, if all ranks are on one. Every rank calls it."""
        self._channel = open_host_channel(self, timeout_s)

    def agree(self, message: bytes | None) -> bytes:
        if self._channel is not None:
            return self._agree_on_host(self._channel, message)
        return self._send(message) if self.rank == 0 else self._receive()

    def _agree_on_host(self, channel: HostChannel, message: bytes | None) -> bytes:
        try:
            if self.rank:
                return channel.receive()
            assert message is not None, "rank 0 always has a message"
            channel.send(message)
            return message
        except WorkerLost as error:
            raise WorkerLost(f"rank {self.rank} of {self.size}: {error.message}") from error

    def _send(self, message: bytes | None) -> bytes:
        assert message is not None, "rank 0 always has a message"
        head = len(message).to_bytes(_LENGTH_BYTES, "little") + message[: _INLINE_BYTES - _LENGTH_BYTES]
        self._inline[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(self._inline)
        rest = message[_INLINE_BYTES - _LENGTH_BYTES :]
        if rest:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))
        return message

    def _receive(self) -> bytes:
        self._broadcast(self._inline)
        head = self._inline.numpy().tobytes()
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        inline = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(inline) == length:
            return inline
        rest = torch.empty(length - len(inline), dtype=torch.uint8)
        self._broadcast(rest)
        return inline + rest.numpy().tobytes()

    def _broadcast(self, tensor: torch.Tensor) -> None:
        try:
            dist.broadcast(tensor, src=0, group=self._control)
        except RuntimeError as error:
            raise self._lost("a peer is gone or silent", error) from error

    def agree_min(self, value: int) -> int:
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._control)
        return int(tensor.item())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._tensors is None:
            return tensor
        started_s = time.perf_counter()
        try:
            dist.all_reduce(tensor, group=self._tensors)
        except RuntimeError as error:
            raise self._lost("all-reduce failed", error) from error
        self._count(started_s, tensor)
        return tensor

    def gather_columns(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        if self._tensors is None:
            return tensor
        started_s = time.perf_counter()
        width = max(sizes)
        rows = tensor.shape[0]
        mine = tensor.new_zeros(rows, width)
        mine[:, : tensor.shape[1]] = tensor
        pieces = [torch.empty_like(mine) for _ in sizes]
        try:
            dist.all_gather(pieces, mine, group=self._tensors)
        except RuntimeError as error:
            raise self._lost("all-gather failed", error) from error
        self._count(started_s, mine)
        return torch.cat([piece[:, :size] for piece, size in zip(pieces, sizes, strict=True)], dim=1)

    def exchange(self, message: bytes) -> list[bytes]:
        """Each rank's message, in rank order, on every rank."""
        lengths = [int(length) for length in self._gather_rows(torch.tensor([len(message)]))]
        row = torch.zeros(max(lengths), dtype=torch.uint8)
        row[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        rows = self._gather_rows(row)
        return [each[:length].numpy().tobytes() for each, length in zip(rows, lengths, strict=True)]

    def _gather_rows(self, row: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(row) for _ in range(self.size)]
        try:
            dist.all_gather(rows, row, group=self._control)
        except RuntimeError as error:
            raise self._lost("a peer is gone or silent", error) from error
        return rows

    def store_exchanging(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block, this thread may let torch exchange more by the store that the group was formed with. Every
        rank does so alike."""
        return self._store.exchanging(self.exchange)

    def _lost(self, what: str, error: RuntimeError) -> WorkerLost:
        return WorkerLost(f"rank {self.rank} of {self.size}: {what} ({_first_line(error)})")

    def _count(self, started_s: float, tensor: torch.Tensor) -> None:
        had, num_bytes = self.traffic, tensor.numel() * tensor.element_size()
        seconds = had.seconds + time.perf_counter() - started_s
        self.traffic = Traffic(seconds, had.calls + 1, had.num_bytes + num_bytes)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        dist.destroy_process_group()


def start_comm(
    place: MeshRank, store: RankStore, device: torch.device, timeout_s: float, *, uses_host_channel: bool = True
) -> GroupComm:
    """Join the process group of a gang of several ranks; every rank calls this, within `timeout_s` of each other.

    When it returns, no port is open for peers any more, except NCCL's own.

    Args:
        timeout_s: longest silence of a peer in any collective, in seconds.
        uses_host_channel: agree over a `HostChannel` where all ranks are on one host, else by gloo; alike on all ranks.
    """
    rank, size = place.rank, place.mesh.size
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    with closing_listeners():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
        control = _new_group(timeout, "gloo")
        tensors = _stage_group(place, timeout)
        stages = _stage_link(place, timeout)
    store.seal()
    comm = GroupComm(place, tensors, control, store, stages)
    if uses_host_channel:
        comm.open_channel(timeout_s)
    return comm


def _stage_group(place: MeshRank, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """The ranks that share this rank's layers. Every rank makes all stages' groups."""
    mesh = place.mesh
    if mesh.pipeline == 1:
        return dist.group.WORLD
    if mesh.tensor == 1:
        return None
    first_ranks = (MeshRank(stage * mesh.tensor, mesh) for stage in range(mesh.pipeline))
    groups = [_new_group(timeout, None, first.stage_ranks) for first in first_ranks]
    return groups[place.pipeline]


def _stage_link(place: MeshRank, timeout: datetime.timedelta) -> StageLink:
    if place.mesh.pipeline == 1:
        return OneStage()
    return GroupStageLink(place, _new_group(timeout, "gloo"), _new_group(timeout, "gloo"))


def _new_group(
    timeout: datetime.timedelta, backend: str | None, ranks: Sequence[int] | None = None
) -> dist.ProcessGroup:
    group: dist.ProcessGroup | None = dist.new_group(ranks, timeout=timeout, backend=backend)
    assert group is not None
    return group


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
