"""`mask_tokens` in the form that is chosen for the logits' device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.token_mask import reference
from tensorweave.kernels.token_mask.native import NativeMaskTokens

MaskTokens: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]
"""See `kernels.token_mask.reference.mask_tokens`: of float32 logits [R, V], contiguous."""


@functools.cache
def choose_mask_tokens(device: torch.device) -> MaskTokens:
    if device.type == "cuda":
        from tensorweave.kernels.token_mask import triton  # only where there is a GPU

        return triton.mask_tokens
    native = load_native(torch.float32) if device.type == "cpu" else None
    if native is None or native.mask_tokens is None:
        return reference.mask_tokens
    return NativeMaskTokens(native.mask_tokens)


def compile_mask_tokens(device: torch.device) -> None:
    """Compile what the first call would compile."""
    logits_RV = torch.zeros(1, 64, device=device)
    masks_NW = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    choose_mask_tokens(device)(logits_RV, masks_NW, torch.zeros(1, dtype=torch.int32, device=device))
