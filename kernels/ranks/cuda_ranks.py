"""What the ranks of a gang exchange in a step, by kernels in CUDA C++ for Hopper GPUs of one host: `ranks.cu`.

Their launches may be captured in CUDA graphs that are replayed any number of times: the count of calls that tells
messages apart lies on the device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, pointer
from tensorweave.kernels.ranks.peer_memory import PeerMemory, padded
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
from tensorweave.kernels.sample.triton import SamplingWorkspace, draw_scores

# T tokens, D hidden size, R rows of logits, V vocabulary of this rank

_SOURCE: Final = Path(__file__).with_name("ranks.cu")
MAX_RANKS: Final = 8
_FEW_ROWS: Final = 8
"""So many rows are summed by half as many threads, of two words each."""
_MAX_BLOCKS: Final = 264
_MOST_PUSHED_BYTES: Final = 1 << 19
"""Of what one rank sends to all others. Then half as many bytes are worth the wait for a row's flag."""
_MOST_FLAGGED_BYTES: Final = 4 << 20
"""Then ranks that share the sums send fewer bytes."""
_PUSHED, _FLAGGED, _SHARED = "add_norm_pushed", "add_norm_flagged", "add_norm_shared"
_WARP: Final = 32


class _Peers(ctypes.Structure):
    _fields_ = [
        ("memories", ctypes.c_void_p * MAX_RANKS), ("fault", ctypes.c_void_p), ("host_fault", ctypes.c_void_p),
        ("limit_ns", ctypes.c_uint64), ("rank", ctypes.c_int),
    ]  # fmt: skip

    @classmethod
    def of(cls, memory: PeerMemory) -> _Peers:
        addresses = (ctypes.c_void_p * MAX_RANKS)(*memory.addresses)
        faults = memory.fault.data_ptr(), memory.host_fault.data_ptr()
        return cls(addresses, *faults, memory.limit_ns, memory.rank)


class _SumArguments(ctypes.Structure):
    _fields_ = [
        ("peers", _Peers),
        *((name, ctypes.c_void_p) for name in ("part", "before", "residual", "gain", "out", "calls")),
        *((f"{name}_at", ctypes.c_uint64) for name in ("inbox", "part", "residual", "out", "flags", "row_flags")),
        *((name, ctypes.c_int) for name in ("num_rows", "max_rows", "is_whole")), ("epsilon", ctypes.c_float),
    ]  # fmt: skip


class _ChoiceArguments(ctypes.Structure):
    _fields_ = [
        ("peers", _Peers),
        *((name, ctypes.c_void_p) for name in ("scores", "places", "calls", "tokens", "slots", "newest")),
        ("inbox_at", ctypes.c_uint64), *((name, ctypes.c_int) for name in ("chunks", "max_rows", "first")),
    ]  # fmt: skip


@cache
def _kernel(name: str, num_ranks: int, width: int, threads: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        return Kernel.load(
            _SOURCE, name, dtype, threads=threads, shared_bytes=0, RANKS=num_ranks, D=width, THREADS=threads,
            BLOCKS=_MAX_BLOCKS, IS_FLOAT32=dtype == torch.float32,
        )  # fmt: skip


def fits(width: int, dtype: torch.dtype, num_ranks: int) -> bool:
    """Whether the kernels are for rows of this width."""
    num_bytes = width * dtype.itemsize
    return 2 <= num_ranks <= MAX_RANKS and num_bytes % 16 == 0 and num_bytes <= 32768


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Up to how many rows a sum is pushed with flags in the data, or with a flag per row; with more, ranks share it."""

    pushed: int
    flagged: int

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, num_ranks: int, max_rows: int) -> RowLimits:
        row_bytes = width * dtype.itemsize * (num_ranks - 1)
        pushed = max(1, min(max_rows, _MOST_PUSHED_BYTES // row_bytes))
        return cls(pushed, max(pushed, min(max_rows, _MOST_FLAGGED_BYTES // row_bytes)))


class CudaSums:
    """Satisfies `RankSums`. 1 / 8 / 64 rows of 4,096 in bfloat16 on two ranks: 2.7 / 3.2 / 5.6 µs in a graph, by the
    prototype of the kernel for few rows (two H200, 2026-11-26)."""

    def __init__(self, memory: PeerMemory, width: int, dtype: torch.dtype, limits: RowLimits) -> None:
        self._memory = memory
        self._peers = _Peers.of(memory)
        self._width = width
        self._dtype = dtype
        self.limits = limits
        places = [
            memory.place_of(memory.take(part, dtype=torch.uint8))
            for part in _sum_parts(width, dtype, memory.num_ranks, limits)
        ]
        self._pushed_at, self._flagged_at, self._row_flags_at, self._block_flags_at = places
        self._calls = {
            name: torch.zeros(count, dtype=torch.int32, device=memory.device)
            for name, count in ((_PUSHED, limits.pushed), (_FLAGGED, limits.flagged), (_SHARED, _MAX_BLOCKS))
        }

    @staticmethod
    def bytes_needed(width: int, dtype: torch.dtype, num_ranks: int, limits: RowLimits, num_rows: int) -> int:
        """The bytes of each rank's `PeerMemory` from which `empty` takes so many rows, in up to eight calls."""
        parts = _sum_parts(width, dtype, num_ranks, limits)
        return sum(map(padded, parts)) + num_rows * width * dtype.itemsize + 8 * padded(1)

    def empty(self, num_rows: int) -> Tensor:
        return self._memory.take(num_rows, self._width, dtype=self._dtype)

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
        T, memory, limits = len(part_TD), self._memory, self.limits
        assert all(each.is_contiguous() for each in (part_TD, x_TD, gain_D, out_TD))
        if not T:
            return
        name = _PUSHED if limits.pushed >= T else _FLAGGED if limits.flagged >= T else _SHARED
        inbox_at, max_rows = (self._pushed_at, limits.pushed) if name == _PUSHED else (self._flagged_at, limits.flagged)
        places = (memory.place_of(part_TD), memory.place_of(x_TD), memory.place_of(out_TD))
        arguments = _SumArguments(
            self._peers, part_TD.data_ptr(), None if is_first else x_TD.data_ptr(), x_TD.data_ptr(), gain_D.data_ptr(),
            out_TD.data_ptr(), self._calls[name].data_ptr(), inbox_at, *places, self._block_flags_at,
            self._row_flags_at, T, max_rows, is_whole, epsilon,
        )  # fmt: skip
        threads = _threads(name, self._width * self._dtype.itemsize, T, memory.num_ranks)
        kernel = _kernel(name, memory.num_ranks, self._width, threads, self._dtype, memory.device)
        num_blocks = min(_MAX_BLOCKS, -(-T // memory.num_ranks)) if name == _SHARED else T
        kernel.launch((num_blocks,), (ctypes.c_void_p * 1)(ctypes.addressof(arguments)), pdl=True)


class CudaChoice:
    """Satisfies `kernels.sample.chosen.Sampler` for rows without limits: see `ReferenceChoice`."""

    def __init__(self, memory: PeerMemory, first: int, max_rows: int) -> None:
        self._memory = memory
        self._peers = _Peers.of(memory)
        self._first = first
        self._max_rows = max_rows
        inbox = memory.take(_choice_bytes(memory.num_ranks, max_rows), dtype=torch.uint8)
        self._inbox_at = memory.place_of(inbox)
        self._calls = torch.zeros(max_rows, dtype=torch.int32, device=memory.device)
        self._workspace = SamplingWorkspace.create(max_rows, memory.device)

    @staticmethod
    def bytes_needed(num_ranks: int, max_rows: int) -> int:
        return padded(_choice_bytes(num_ranks, max_rows))

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        self._choose(logits_RV, None, target)

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        assert not has_limits, "limits need all of a row's logits"
        self._choose(logits_RV, parameters, target)

    def _choose(self, logits_RV: Tensor, parameters: SamplingParameters | None, target: TokenTarget) -> None:
        workspace, memory = self._workspace, self._memory
        assert len(logits_RV) <= self._max_rows
        assert target.tokens_R.dtype == torch.int64
        chunks = draw_scores(logits_RV, parameters, self._first, workspace, pdl=True)
        arguments = _ChoiceArguments(
            self._peers, workspace.scores.data_ptr(), workspace.places.data_ptr(), self._calls.data_ptr(),
            target.tokens_R.data_ptr(), pointer(target.slots_R), pointer(target.newest_S), self._inbox_at, chunks,
            self._max_rows, self._first,
        )  # fmt: skip
        kernel = _kernel("choose", memory.num_ranks, _WARP, _WARP, torch.float32, memory.device)
        kernel.launch((len(logits_RV),), (ctypes.c_void_p * 1)(ctypes.addressof(arguments)), pdl=True)


def _threads(name: str, row_bytes: int, num_rows: int, num_ranks: int) -> int:
    """Few words of 8 bytes per thread, or pieces of 16, so that those of all ranks are in registers."""
    if name != _PUSHED:
        return min(512, _warps(-(-row_bytes // 16)))
    is_slim = num_rows <= _FEW_ROWS and num_ranks <= 4
    return min(1024, _warps(-(-row_bytes // (16 if is_slim else 8))))


def _warps(threads: int) -> int:
    return -(-threads // _WARP) * _WARP


def _sum_parts(width: int, dtype: torch.dtype, num_ranks: int, limits: RowLimits) -> tuple[int, int, int, int]:
    """Bytes of two turns of pushed rows from each rank, half of each message being flags; of as many flagged rows; of
    their flags; and of two flags per block."""
    turn = 2 * num_ranks * width * dtype.itemsize
    return (
        2 * turn * limits.pushed,
        turn * limits.flagged,
        num_ranks * limits.flagged * 4,
        2 * num_ranks * _MAX_BLOCKS * 4,
    )


def _choice_bytes(num_ranks: int, max_rows: int) -> int:
    return 2 * num_ranks * max_rows * 16
