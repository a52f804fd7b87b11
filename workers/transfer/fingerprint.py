"""What two gangs must have in common for a KV block of one to be valid in the other: values compared by name."""

from __future__ import annotations

from typing import Final

from tensorweave.workers.transfer.window import PoolWindow

TRANSFER_VERSION: Final = 1
"""Raise it when digests, packing or the pool's layout change."""


def fingerprint(window: PoolWindow, model: str, num_heads: int) -> dict[str, str]:
    """`model` is a digest of the weights; `num_heads` counts the model's KV heads over all ranks."""
    return {
        "version": str(TRANSFER_VERSION),
        "model": model,
        "dtype": window.dtype_name,
        "tokens_per_block": str(window.tokens_per_block),
        "layout": f"{window.num_layers} layers, {num_heads} KV heads of {window.head_dim}",
    }


def fingerprint_difference(sender: dict[str, str], receiver: dict[str, str]) -> str | None:
    """Describe the first value that differs; None if blocks of the sender are valid at the receiver."""
    for name in [*sender, *(name for name in receiver if name not in sender)]:
        if sender.get(name) != receiver.get(name):
            return f"{name}: {sender.get(name)!r} at the sender, {receiver.get(name)!r} at the receiver"
    return None
