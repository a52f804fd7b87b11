"""Attention by the native kernel, which reads the paged cache in place."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionShape, Span
from tensorweave.kernels.heads.kv_slots import KvSlots
from tensorweave.kernels.native.library import NativeKernels
from tensorweave.kernels.native.structures import QueryTile, WindowPlan
from tensorweave.kernels.weights import FP8

# T tokens of the batch, R runs of query heads with a KV head each, G query heads per run, K KV heads, H head dim
# B blocks, P tokens per block, C = 2 K planes of a block

# The kernel takes the keys of a sequence in runs of this many, from its first position on (RUN in its source), and a
# prompt's queries in tiles, which share what they read.
_KEYS_OF_RUN = 256
_TILE_QUERIES = 48


@dataclass(frozen=True, slots=True)
class NativeAttentionPlan:
    """`windows` has a `WindowPlan` for each window of the shape, in the backend's order. The plans point into `tiles`
    and `blocks`."""

    native: NativeKernels
    slots: KvSlots
    window_order: tuple[int | None, ...]
    windows: ctypes.Array[WindowPlan]
    read_heads_R: Tensor
    tiles: Sequence[ctypes.Array[QueryTile]]
    blocks: array[int]

    @property
    def num_tasks(self) -> int:
        """The tasks of the window that has most."""
        return max(plan.num_tasks for plan in self.windows)

    def in_order(self, windows: Sequence[int | None]) -> ctypes.Array[WindowPlan]:
        return (WindowPlan * len(windows))(*(self.windows[self.window_order.index(window)] for window in windows))

    def write(self, kv_TCH: Tensor, cache_BCPH: Tensor) -> None:
        self.slots.write(kv_TCH, cache_BCPH)

    def attend(
        self,
        q_TNH: Tensor,
        cache_BCPH: Tensor,
        window: int | None,
        scale: float,
        *,
        soft_cap: float | None = None,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        T, N, H = q_TNH.shape
        _, C, P, _ = cache_BCPH.shape
        R = len(self.read_heads_R)
        plan = self.windows[self.window_order.index(window)]
        out_TNH = torch.empty(T, N, H, dtype=q_TNH.dtype)
        partial = torch.empty(plan.num_tasks * (N // R) * (H + 2), dtype=torch.float32)
        self.native.attend(
            q_TNH.data_ptr(),
            q_TNH.stride(0),
            cache_BCPH.data_ptr(),
            ctypes.addressof(plan),
            self.read_heads_R.data_ptr(),
            partial.data_ptr(),
            out_TNH.data_ptr(),
            *(R, N // R, C // 2, P, H),
            *(scale, soft_cap or 0.0),
            None if sinks_N is None else sinks_N.data_ptr(),
            cache_BCPH.dtype == FP8,
        )
        return out_TNH


class NativeAttention:
    """An `AttentionBackend` for head dims that are a multiple of a vector."""

    def __init__(self, native: NativeKernels, shape: AttentionShape) -> None:
        assert self.fits(native, shape.head_dim)
        self._native = native
        self._shape = shape
        self._windows = tuple(shape.windows)
        self._read_heads_R = torch.tensor(shape.read_heads, dtype=torch.int64)

    @staticmethod
    def fits(native: NativeKernels, head_dim: int) -> bool:
        return head_dim % native.vector_length == 0

    def plan(self, spans: Sequence[Span], slots_T: Tensor) -> NativeAttentionPlan:
        blocks, first_blocks = array("i"), []
        for span in spans:
            first_blocks.append(len(blocks))
            blocks.extend(span.blocks)
        tiles, plans = [], []
        for window in self._windows:
            rows, num_tasks = self._tile(spans, first_blocks, window)
            tiles.append((QueryTile * len(rows))(*rows))
            first_tile, first_block = ctypes.addressof(tiles[-1]), blocks.buffer_info()[0]
            plans.append(WindowPlan(first_tile, first_block, len(rows), num_tasks, window or 0))
        windows = (WindowPlan * len(plans))(*plans)
        slots = KvSlots(slots_T, 2 * self._shape.num_kv_heads, self._shape.tokens_per_block)
        return NativeAttentionPlan(self._native, slots, self._windows, windows, self._read_heads_R, tiles, blocks)

    def _tile(self, spans: Sequence[Span], first_blocks: Sequence[int], window: int | None) -> tuple[list[Any], int]:
        """The fields of each `QueryTile`, and the number of tasks."""
        tiles: list[tuple[int, ...]] = []
        num_tasks, R = 0, len(self._shape.read_heads)
        for span, first_block in zip(spans, first_blocks, strict=True):
            # Late queries see most keys: threads that take tiles in order should end with small ones.
            for first in reversed(range(0, span.length, _TILE_QUERIES)):
                size, start = min(_TILE_QUERIES, span.length - first), span.start + first
                tiles.append((span.first_row + first, size, start, first_block, num_tasks))
                first_key = 0 if window is None else max(0, start + 1 - window)
                num_tasks += R if size > 1 else R * (start // _KEYS_OF_RUN - first_key // _KEYS_OF_RUN + 1)
        return tiles, num_tasks
