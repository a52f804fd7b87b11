"""A x of the rows of a decode step by the adapters of their own, on Hopper: `shrink.cu`. `thin_linear` adds B A x."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel
from tensorweave.kernels.lora.stack import SiteStack

# M rows, K inputs of the product, P parts of its outputs, L places, R most rank, S parts of the inputs

MAX_ROWS: Final = 128
_SOURCE: Final = Path(__file__).with_name("shrink.cu")
_THREADS, _INPUTS, _RANKS = 256, 1024, 16
"""Of a block."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "x", "places", "ranks", "parts", "arrived", "low")),
        *((name, ctypes.c_int) for name in ("T", "K", "P", "L", "R")),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShrinkWorkspace:
    """For launches in stream order, over any of the stacks that it was made for. The counters stay zero."""

    parts: Tensor
    arrived: Tensor
    low: Tensor

    @classmethod
    def create(cls, stacks: Sequence[SiteStack], max_rows: int) -> ShrinkWorkspace:
        first = stacks[0].a_PLRK
        width = max(stack.num_parts * stack.max_rank for stack in stacks)
        tiles = max(stack.a_PLRK.shape[:3].numel() // _RANKS for stack in stacks)
        sums = max(_num_splits(stack) * stack.num_parts * stack.max_rank for stack in stacks)
        return cls(
            torch.empty(max_rows * sums, dtype=torch.float32, device=first.device),
            torch.zeros(tiles, dtype=torch.int32, device=first.device),
            torch.empty(max_rows * width, dtype=first.dtype, device=first.device),
        )

    def low_of(self, num_rows: int, stack: SiteStack) -> Tensor:
        """[M, P, R]."""
        shape = num_rows, stack.num_parts, stack.max_rank
        return self.low[: num_rows * stack.num_parts * stack.max_rank].view(shape)


@cache
def _kernel(dtype: torch.dtype, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        return Kernel.load(_SOURCE, "shrink", dtype, threads=_THREADS, shared_bytes=0)


def fits(stack: SiteStack) -> bool:
    """Whether the kernel is for this shape."""
    return stack.a_PLRK.shape[3] % 64 == 0 and stack.max_rank % _RANKS == 0


def shrink(
    x_MK: Tensor, places_M: Tensor, stack: SiteStack, workspace: ShrinkWorkspace, *, pdl: bool = False
) -> Tensor:
    """Return low [M, P, R], a view of the workspace: A x, rounded to the type of x, of the adapter at each row's place;
    rows at place -1 are not written.

    Args:
        x_MK: contiguous, at most `MAX_ROWS` rows, 16 bits.
        places_M: int32; written two kernels before at the latest.
        pdl: launch while the kernel before still runs. The kernel behind then finds complete what was written before
            this one, and must wait before it reads `low`.

    Equal bits for a row whatever the other rows are.
    """
    M, K = x_MK.shape
    P, L, R, _ = stack.a_PLRK.shape
    assert 1 <= M <= MAX_ROWS
    assert fits(stack)
    assert stack.a_PLRK.shape[3] == K
    for tensor in (x_MK, places_M, stack.a_PLRK):
        assert tensor.is_contiguous()
    low_MPR, splits, tiles = workspace.low_of(M, stack), _num_splits(stack), P * L * R // _RANKS
    assert workspace.parts.numel() >= splits * low_MPR.numel()
    assert workspace.arrived.numel() >= tiles
    arguments = _Arguments(
        stack.a_PLRK.data_ptr(), x_MK.data_ptr(), places_M.data_ptr(), stack.ranks_L.data_ptr(),
        workspace.parts.data_ptr(), workspace.arrived.data_ptr(), low_MPR.data_ptr(), M, K, P, L, R,
    )  # fmt: skip
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    _kernel(x_MK.dtype, x_MK.device).launch((tiles, splits), addresses, pdl=pdl)
    return low_MPR


def _num_splits(stack: SiteStack) -> int:
    return -(-stack.a_PLRK.shape[3] // _INPUTS)
