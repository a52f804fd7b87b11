"""Converts logits and biases between tensors and the packed little-endian float32 of the wire. Called by the LLM API,
which does not import torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Tensor", "pack_bias", "read_logits"]


def read_logits(packed: bytes, vocab_size: int) -> Tensor:
    """Float32 [N, V] with memory of its own."""
    if not packed:
        return torch.empty(0, vocab_size)
    return torch.frombuffer(bytearray(packed), dtype=torch.float32).view(-1, vocab_size)


def pack_bias(bias: Any) -> bytes:
    """From a tensor, an array or a list with one number per token. Raises ValueError for anything else."""
    try:
        bias_V = torch.as_tensor(bias, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"embedding_bias cannot be read as float32 numbers: {error}") from None
    if bias_V.dim() != 1:
        raise ValueError(f"embedding_bias has shape {list(bias_V.shape)}, must be one number per token")
    packed: bytes = bias_V.contiguous().numpy().astype("<f4", copy=False).tobytes()
    return packed
