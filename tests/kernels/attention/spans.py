"""Batches for tests of attention."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.attention.backend import AttentionPlan, AttentionShape, Span
from tensorweave.kernels.operations import Operations

MIXES: Final = {
    "decodes": [(4, 1), (7, 1), (8, 1), (0, 1)],
    "decodes of unlike lengths": [(3, 1), (150, 1), (2, 1), (149, 1), (40, 1)],
    "whole prompts": [(0, 9), (0, 16), (0, 2)],
    "later chunks": [(5, 9), (16, 16), (31, 2)],
    "a mix": [(0, 17), (60, 1), (13, 6), (5, 1), (33, 1), (0, 270), (20, 260)],
}


def make_spans(lengths: Iterable[tuple[int, int]], tokens_per_block: int, num_blocks: int) -> list[Span]:
    """Spans of (start, length), each in random blocks of its own, with spare ones at the end of its table."""
    free = list(range(num_blocks))
    random.Random(0).shuffle(free)
    spans, row = [], 0
    for start, length in lengths:
        count = -(-(start + length) // tokens_per_block) + 1
        spans.append(Span(row, length, start, [free.pop() for _ in range(count)]))
        row += length
    return spans


def slots_of(spans: Sequence[Span], tokens_per_block: int) -> Tensor:
    P = tokens_per_block
    return torch.tensor(
        [span.blocks[i // P] * P + i % P for span in spans for i in range(span.start, span.stop)], dtype=torch.int64
    )


def plan_of(
    operations: Operations,
    spans: Sequence[Span],
    num_kv_heads: int,
    read_heads: tuple[int, ...],
    head_dim: int,
    tokens_per_block: int,
    windows: Iterable[int | None],
) -> AttentionPlan:
    shape = AttentionShape(num_kv_heads, read_heads, head_dim, tokens_per_block, frozenset(windows))
    return operations.make_attention(shape).plan(spans, slots_of(spans, tokens_per_block))
