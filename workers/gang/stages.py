"""`StageLink`: how a rank hands hidden states to the next pipeline stage, and the last stage its results to the others.

Each rank exchanges with those of the same place on the tensor axis. `GroupStageLink` uses torch.distributed; `OneStage`
is the Null object of gangs without stages. If a peer dies or is silent, `WorkerLost` is raised.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

import torch
import torch.distributed as dist

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.mesh import MeshRank

# T tokens, D hidden size

_INLINE_BYTES: Final = 4096
_LENGTH_BYTES: Final = 8


class StageLink(Protocol):
    """States and results may be handled by different threads, each by one at a time. What is sent first is received
    first."""

    @property
    def is_waiting(self) -> bool:
        """Whether a peer is waited for now. Any thread may look."""

    def note_computed(self, seconds: float) -> None:
        """A step has been computed on the thread that handles states; `seconds` include its waiting for them."""

    def gauges(self) -> Mapping[str, float]:
        """From any thread: counters of this stage for metrics."""

    def send_states(self, x_TD: torch.Tensor) -> None:
        """Begin to send hidden states to the next stage. Nobody may change them any more."""

    def receive_states(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Fill `x_TD` with the hidden states of the stage before, and return it."""

    def send_result(self, message: bytes) -> None:
        """Last stage: begin to send a step's result to all other stages."""

    def receive_result(self) -> bytes:
        """Other stages: wait for the next result."""


class OneStage:
    """There is nobody to send to: nothing is sent, and nothing may be waited for."""

    is_waiting = False

    def note_computed(self, seconds: float) -> None:
        return None

    def gauges(self) -> Mapping[str, float]:
        return {}

    def send_states(self, x_TD: torch.Tensor) -> None:
        return None

    def receive_states(self, x_TD: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no stage is before the only one")

    def send_result(self, message: bytes) -> None:
        return None

    def receive_result(self) -> bytes:
        raise AssertionError("no stage is behind the only one")


class GroupStageLink:
    """Point to point in two gloo groups of all ranks, one for the compute threads and one for results.

    A result is one message of a fixed size: 8 bytes of length, then the result. What does not fit follows in a second
    message.

    Args:
        place: this rank.
        states: for hidden states.
        results: for results.
    """

    def __init__(self, place: MeshRank, states: dist.ProcessGroup, results: dist.ProcessGroup) -> None:
        self._place = place
        self._states = _Messages(states, place)
        self._results = _Messages(results, place)
        self._waited_s = 0.0  # of the step that is computed now
        self._busy_s = 0.0

    @property
    def is_waiting(self) -> bool:
        return self._states.is_waiting or self._results.is_waiting

    def note_computed(self, seconds: float) -> None:
        self._busy_s += seconds - self._waited_s
        self._waited_s = 0.0

    def gauges(self) -> Mapping[str, float]:
        stage = f"stage_{self._place.pipeline}"
        return {
            f"{stage}_busy_seconds_total": self._busy_s,
            f"{stage}_sent_bytes_total": self._states.num_bytes + self._results.num_bytes,
        }

    def send_states(self, x_TD: torch.Tensor) -> None:
        self._states.send(x_TD, self._place.pipeline + 1)

    def receive_states(self, x_TD: torch.Tensor) -> torch.Tensor:
        began_s = time.perf_counter()
        self._states.receive(x_TD, self._place.pipeline - 1)
        self._waited_s += time.perf_counter() - began_s
        return x_TD

    def send_result(self, message: bytes) -> None:
        head = len(message).to_bytes(_LENGTH_BYTES, "little") + message[: _INLINE_BYTES - _LENGTH_BYTES]
        parts = [_tensor_of(head.ljust(_INLINE_BYTES, b"\0"))]
        if rest := message[_INLINE_BYTES - _LENGTH_BYTES :]:
            parts.append(_tensor_of(rest))
        for stage in range(self._place.mesh.pipeline - 1):
            for part in parts:
                self._results.send(part, stage)

    def receive_result(self) -> bytes:
        last = self._place.mesh.pipeline - 1
        head = self._results.receive(torch.empty(_INLINE_BYTES, dtype=torch.uint8), last).numpy().tobytes()
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        inline = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(inline) == length:
            return inline
        rest = self._results.receive(torch.empty(length - len(inline), dtype=torch.uint8), last)
        return inline + rest.numpy().tobytes()


class _Messages:
    """Sends are not waited for, as many as the peers' steps in flight; tensors live until they are sent."""

    def __init__(self, group: dist.ProcessGroup, place: MeshRank) -> None:
        self.is_waiting = False
        self.num_bytes = 0
        """That were sent. Any thread may read it."""
        self._group = group
        self._place = place
        self._most_open = 4 * place.mesh.pipeline
        self._open: collections.deque[tuple[dist.Work, torch.Tensor]] = collections.deque()

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        tensor = tensor.contiguous()
        with self._waiting(stage):
            while self._open and (self._open[0][0].is_completed() or len(self._open) >= self._most_open):
                self._open.popleft()[0].wait()
            work = dist.isend(tensor, dst=self._place.in_stage(stage).rank, group=self._group)
        assert work is not None
        self._open.append((work, tensor))
        self.num_bytes += tensor.numel() * tensor.element_size()

    def receive(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        with self._waiting(stage):
            dist.recv(tensor, src=self._place.in_stage(stage).rank, group=self._group)
        return tensor

    @contextlib.contextmanager
    def _waiting(self, stage: int) -> Iterator[None]:
        self.is_waiting = True
        try:
            yield
        except RuntimeError as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise WorkerLost(f"rank {self._place.rank}: pipeline stage {stage} is gone or silent ({cause})") from error
        finally:
            self.is_waiting = False


def _tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
