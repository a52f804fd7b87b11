"""How the ranks of a gang talk: one agreement a step, and the tensor-parallel collectives.

`Comm` is what the executor and the model see; `SoloComm` is the one-rank Null object, `GroupComm` runs over
torch.distributed (NCCL for tensors on GPUs, gloo for tensors on CPUs and always for agreements). A peer that dies or
stays silent surfaces as `WorkerLost`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.ranks import Traffic
from tensorweave.workers.gang.gloo_listeners import shut_afterwards
from tensorweave.workers.gang.rendezvous import RankStore

_INLINE_BYTES = 4096
_LENGTH_BYTES = 8


class Comm(Protocol):
    """`rank` of the gang's `size`, both of `place`. Every rank must make the same calls in the same order."""

    place: MeshRank
    rank: int
    size: int

    def agree(self, news: bytes | None) -> bytes:
        """Rank 0's `news`, given to every rank; the others pass None."""

    def agree_min(self, value: int) -> int:
        """The smallest of all ranks' values."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; the same bits on every rank."""

    def gather_columns(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """[R, sizes[rank]] of each rank side by side: [R, sum(sizes)], on every rank."""

    def close(self) -> None:
        """Leave the group; no call follows."""


class SoloComm:
    """One rank: agreements and sums are what they are given."""

    place = MeshRank()
    rank = 0
    size = 1

    def agree(self, news: bytes | None) -> bytes:
        assert news is not None, "rank 0 always has news"
        return news

    def agree_min(self, value: int) -> int:
        return value

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_columns(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return tensor

    def close(self) -> None:
        return None


class GroupComm:
    """Ranks of one gang over torch.distributed.

    An agreement is one gloo broadcast of a fixed buffer: 8 bytes of length, then the news; longer news follow in a
    second one.
    """

    def __init__(
        self, place: MeshRank, tensors: dist.ProcessGroup, control: dist.ProcessGroup, store: RankStore
    ) -> None:
        self.place = place
        self.rank = place.rank
        self.size = place.mesh.size
        self._store = store  # torch holds what is in C++ of it, and calls what is in Python
        self._tensors = tensors
        self._control = control
        self._inline = torch.zeros(_INLINE_BYTES, dtype=torch.uint8)
        self.traffic = Traffic()
        """Of `all_reduce` and `gather_columns`; any thread may look."""

    def agree(self, news: bytes | None) -> bytes:
        return self._send(news) if self.rank == 0 else self._receive()

    def _send(self, news: bytes | None) -> bytes:
        assert news is not None, "rank 0 always has news"
        head = len(news).to_bytes(_LENGTH_BYTES, "little") + news[: _INLINE_BYTES - _LENGTH_BYTES]
        self._inline[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._broadcast(self._inline)
        rest = news[_INLINE_BYTES - _LENGTH_BYTES :]
        if rest:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))
        return news

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
            raise WorkerLost(
                f"rank {self.rank} of {self.size}: a peer is gone or silent ({_first_line(error)})"
            ) from error

    def agree_min(self, value: int) -> int:
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._control)
        return int(tensor.item())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        started_s = time.perf_counter()
        try:
            dist.all_reduce(tensor, group=self._tensors)
        except RuntimeError as error:
            raise WorkerLost(f"rank {self.rank} of {self.size}: all-reduce failed ({_first_line(error)})") from error
        self._count(started_s, tensor)
        return tensor

    def gather_columns(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        started_s = time.perf_counter()
        width = max(sizes)
        rows = tensor.shape[0]
        mine = tensor.new_zeros(rows, width)
        mine[:, : tensor.shape[1]] = tensor
        pieces = [torch.empty_like(mine) for _ in sizes]
        try:
            dist.all_gather(pieces, mine, group=self._tensors)
        except RuntimeError as error:
            raise WorkerLost(f"rank {self.rank} of {self.size}: all-gather failed ({_first_line(error)})") from error
        self._count(started_s, mine)
        return torch.cat([piece[:, :size] for piece, size in zip(pieces, sizes, strict=True)], dim=1)

    def _count(self, started_s: float, tensor: torch.Tensor) -> None:
        had, num_bytes = self.traffic, tensor.numel() * tensor.element_size()
        seconds = had.seconds + time.perf_counter() - started_s
        self.traffic = Traffic(seconds, had.calls + 1, had.num_bytes + num_bytes)

    def close(self) -> None:
        dist.destroy_process_group()


def start_comm(place: MeshRank, store: RankStore | None, device: torch.device, timeout_s: float) -> Comm:
    """Join the gang's group through its rendezvous store; every rank calls this, within `timeout_s` of each other.
    Nothing listens for peers any more when it returns, but what NCCL does.

    Args:
        store: the gang's; may be None for a gang of one.
        timeout_s: longest silence of a peer in any collective, in seconds.
    """
    rank, size = place.rank, place.mesh.size
    if size == 1:
        return SoloComm()
    assert store is not None, "a gang of several ranks needs a rendezvous"
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    with shut_afterwards():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
        control = dist.new_group(backend="gloo", timeout=timeout)
    store.seal()
    world = dist.group.WORLD
    assert world is not None
    assert control is not None
    return GroupComm(place, world, control, store)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
