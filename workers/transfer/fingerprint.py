"""What two gangs must have alike for a KV block of one to be right in the other: names and values, compared by name."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.transfer.window import PoolWindow

TRANSFER_VERSION: Final = 1
"""Raise it when digests, packing or the pool's layout change."""


def fingerprint(window: PoolWindow, model: str, num_heads: int) -> dict[str, str]:
    """`model` is a digest of the weights; `num_heads` are the model's KV heads, over all ranks."""
    return {
        "version": str(TRANSFER_VERSION),
        "model": model,
        "dtype": window.dtype_name,
        "tokens_per_block": str(window.tokens_per_block),
        "layout": f"{window.num_layers} layers, {num_heads} KV heads of {window.head_dim}",
    }
