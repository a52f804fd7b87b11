"""What the ranks of a gang exchange in a step, by kernels in CUDA C++ for Hopper GPUs of one host: `ranks.cu`.

Their launches may be captured in CUDA graphs that are replayed any number of times: the count of calls that tells
messages apart lies on the device.
"""

from __future__ import annotations

import ctypes
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
_MOST_PUSHED_BYTES: Final = 1 << 20
"""Of the parts that one rank sends to one other; larger sums are shared."""
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
        *((f"{name}_at", ctypes.c_uint64) for name in ("inbox", "part", "residual", "out", "flags")),
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


class CudaSums:
    """Satisfies `RankSums`. 1 / 8 / 64 rows of 4,096 in bfloat16 on two ranks: 2.7 / 3.2 / 5.6 µs in a graph, by the
    prototype of the kernel for few rows (two H200, 2026-11-26)."""

    def __init__(self, memory: PeerMemory, width: int, dtype: torch.dtype, most_pushed_rows: int) -> None:
        self._memory = memory
        self._peers = _Peers.of(memory)
        self._width = width
        self._dtype = dtype
        self._most_pushed_rows = most_pushed_rows
        inbox_bytes, flag_bytes = (
            _inbox_bytes(width, dtype, memory.num_ranks, most_pushed_rows),
            _flag_bytes(memory.num_ranks),
        )
        self._inbox_at = memory.place_of(memory.take(inbox_bytes, dtype=torch.uint8))
        self._flags_at = memory.place_of(memory.take(flag_bytes, dtype=torch.uint8))
        self._row_calls = torch.zeros(most_pushed_rows, dtype=torch.int32, device=memory.device)
        self._block_calls = torch.zeros(_MAX_BLOCKS, dtype=torch.int32, device=memory.device)

    @staticmethod
    def bytes_needed(width: int, dtype: torch.dtype, num_ranks: int, most_pushed_rows: int, num_rows: int) -> int:
        """Of each rank's `PeerMemory`, with so many rows that are taken by `empty`, in up to eight calls."""
        parts = _inbox_bytes(width, dtype, num_ranks, most_pushed_rows), _flag_bytes(num_ranks)
        return sum(padded(part) for part in parts) + num_rows * width * dtype.itemsize + 8 * padded(1)

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
        T, memory = len(part_TD), self._memory
        assert all(each.is_contiguous() for each in (part_TD, x_TD, gain_D, out_TD))
        if not T:
            return
        is_pushed = self._most_pushed_rows >= T
        calls = self._row_calls if is_pushed else self._block_calls
        places = (memory.place_of(part_TD), memory.place_of(x_TD), memory.place_of(out_TD))
        arguments = _SumArguments(
            self._peers, part_TD.data_ptr(), None if is_first else x_TD.data_ptr(), x_TD.data_ptr(), gain_D.data_ptr(),
            out_TD.data_ptr(), calls.data_ptr(), self._inbox_at, *places, self._flags_at, T, self._most_pushed_rows,
            is_whole, epsilon,
        )  # fmt: skip
        name = "add_norm_pushed" if is_pushed else "add_norm_shared"
        threads = _threads(self._width * self._dtype.itemsize, T, memory.num_ranks, is_pushed=is_pushed)
        kernel = _kernel(name, memory.num_ranks, self._width, threads, self._dtype, memory.device)
        num_blocks = T if is_pushed else min(_MAX_BLOCKS, -(-T // memory.num_ranks))
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


def most_pushed_rows(width: int, dtype: torch.dtype, num_ranks: int, max_rows: int) -> int:
    """Rows of a sum that each rank sends to all others; with more, each sums its share."""
    return max(1, min(max_rows, _MOST_PUSHED_BYTES // (width * dtype.itemsize * (num_ranks - 1))))


def _threads(row_bytes: int, num_rows: int, num_ranks: int, *, is_pushed: bool) -> int:
    """At most two words of 8 bytes per thread, or two pieces of 16, so that those of all ranks are in registers."""
    unit = 8 if is_pushed else 16
    wanted = -(-row_bytes // unit)
    is_slim = is_pushed and num_rows <= _FEW_ROWS and num_ranks <= 4
    threads = -(-wanted // 2) if is_slim else wanted
    return min(1024 if is_pushed else 512, -(-threads // _WARP) * _WARP)


def _inbox_bytes(width: int, dtype: torch.dtype, num_ranks: int, num_rows: int) -> int:
    """Two turns of rows from each rank; 8 of 16 bytes are the message."""
    return 2 * num_ranks * num_rows * 2 * width * dtype.itemsize


def _flag_bytes(num_ranks: int) -> int:
    return 2 * num_ranks * _MAX_BLOCKS * 4


def _choice_bytes(num_ranks: int, max_rows: int) -> int:
    return 2 * num_ranks * max_rows * 16
