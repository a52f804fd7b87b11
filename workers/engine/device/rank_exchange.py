"""`RankExchange`: what the ranks of a device engine exchange while a step is computed; `make_exchange` chooses how."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import WorkerLost
from tensorweave.kernels.device_operations import DeviceOperations
from tensorweave.kernels.ranks.peer_memory import PeerMemory
from tensorweave.kernels.ranks.reference import ReferenceChoice, ReferenceSums
from tensorweave.kernels.ranks.sums import RankSums
from tensorweave.kernels.sample.chosen import Sampler
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.peers import open_peer_memory
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.step.vocabulary import SplitVocabulary, Vocabulary, WholeVocabulary

# T tokens, D hidden size

logger = logging.getLogger(__name__)

KERNEL_WAIT_S: Final = 30.0
"""How long a kernel waits for another rank: longer than a rank that works is late, a collection of garbage included."""


@dataclass(frozen=True, slots=True)
class RankExchange:
    """What one rank exchanges with the others of its gang.

    Args:
        sums: None: this rank has the whole model.
        check: see `StepLogits.check`.
        meet: waits for all ranks, where one may be later than the others' kernels wait.
    """

    sums: RankSums | None
    vocabulary: Vocabulary
    check: Callable[[], None] | None
    meet: Callable[[], object]


class CommSums:
    """Satisfies `RankSums` by an all-reduce of NCCL, in the type of the parts, and the norm as a kernel of its own: for
    ranks on several hosts, and GPUs that cannot read each other's memory."""

    def __init__(self, comm: Comm, operations: DeviceOperations, model: DeviceModel) -> None:
        self._comm = comm
        self._operations = operations
        self._model = model

    def empty(self, num_rows: int) -> Tensor:
        return torch.zeros(num_rows, self._model.hidden_size, dtype=self._model.dtype, device=self._model.device)

    def add_norm(
        self,
        part_TD: Tensor,
        x_TD: Tensor,
        gain_D: Tensor,
        epsilon: float,
        out_TD: Tensor,
        *,
        is_first: bool = False,
        is_whole: bool = True,
    ) -> None:
        self._comm.all_reduce(part_TD)
        if is_first:
            x_TD.copy_(part_TD)
        else:
            x_TD.add_(part_TD)
        self._operations.rms_norm(x_TD, gain_D, epsilon, out_TD)


def make_exchange(
    model: DeviceModel, operations: DeviceOperations, comm: Comm, max_tokens: int, max_rows: int
) -> RankExchange:
    """For steps of up to so many tokens, of which so many sample. Every rank calls it."""
    if model.is_whole:
        return RankExchange(None, WholeVocabulary(), None, _nothing)
    first, sizes = model.vocabulary.first, model.vocabulary.sizes
    sums: RankSums
    sampler: Sampler | None
    check: Callable[[], None] | None = None
    if model.device.type == "cpu":
        sums = ReferenceSums(
            comm.gather_columns, comm.rank, comm.size, model.hidden_size, model.dtype, model.device
        )  # fmt: skip
        sampler = ReferenceChoice(comm.gather_columns, comm.size, first)
    elif (memory := _share_memory(model, comm, max_tokens, max_rows)) is not None:
        from tensorweave.kernels.ranks.cuda_ranks import CudaChoice, CudaSums, RowLimits  # needs Triton

        limits = RowLimits.of(model.hidden_size, model.dtype, comm.size, max(max_tokens, max_rows))
        sums = CudaSums(memory, model.hidden_size, model.dtype, limits)
        sampler = CudaChoice(memory, first, max_rows)
        check = SilenceCheck(memory, comm.rank)
    else:
        sums, sampler = CommSums(comm, operations, model), None
    vocabulary = SplitVocabulary(sampler, comm.gather_columns, sizes, max_rows, model.device)
    return RankExchange(sums, vocabulary, check, lambda: comm.agree_min(0))


@dataclass(frozen=True, slots=True)
class SilenceCheck:
    memory: PeerMemory
    rank: int

    def __call__(self) -> None:
        silent = self.memory.silent_rank()
        if silent is not None:
            raise WorkerLost(
                f"rank {self.rank}'s GPU has waited {self.memory.limit_ns / 1e9:g} s for what rank {silent} computes"
            )


def _share_memory(model: DeviceModel, comm: Comm, max_tokens: int, max_rows: int) -> PeerMemory | None:
    from tensorweave.kernels.cuda.program import can_run_hopper_kernels
    from tensorweave.kernels.ranks.cuda_ranks import CudaChoice, CudaSums, RowLimits, fits  # needs Triton

    width, dtype, size = model.hidden_size, model.dtype, comm.size
    has_kernels = can_run_hopper_kernels(model.device) and fits(width, dtype, size)
    limits, num_rows = RowLimits.of(width, dtype, size, max(max_tokens, max_rows)), 3 * (max_tokens + max_rows)
    num_bytes = CudaSums.bytes_needed(width, dtype, size, limits, num_rows) + CudaChoice.bytes_needed(size, max_rows)
    all_have_kernels = comm.agree_min(int(has_kernels)) == 1
    memory = open_peer_memory(comm, num_bytes, model.device, KERNEL_WAIT_S) if all_have_kernels else None
    if memory is None:
        logger.warning(
            "ranks sum by NCCL alone, which is slower: their GPUs share no memory, or have no kernels for it"
        )
    return memory


def _nothing() -> None:
    return None
