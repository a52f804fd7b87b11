"""`Sampler`: the operations that choose tokens; `choose_sampler` makes the one for a device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.sample.native import NativeSampler
from tensorweave.kernels.sample.reference import ReferenceSampler
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget

# R rows of logits, V vocabulary


class Sampler(Protocol):
    """Chooses a token for each row of logits, float32 (or bfloat16 on a GPU); -inf bans a token. Does not wait for the
    device."""

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        """The first place of each row's largest number."""

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        """By the rule of `kernels.sample.rule`. `has_limits`: any row has min-p, top-k or top-p."""


def choose_sampler(device: torch.device) -> Sampler:
    """The fastest form on this device."""
    if device.type == "cuda":
        # Only where there is a GPU.
        from tensorweave.kernels.cuda.program import can_run_hopper_kernels
        from tensorweave.kernels.sample.hopper import HopperSampler
        from tensorweave.kernels.sample.triton import TritonSampler

        return HopperSampler(device) if can_run_hopper_kernels(device) else TritonSampler(device)
    native = load_native(torch.float32) if device.type == "cpu" else None
    return ReferenceSampler() if native is None else NativeSampler(native)
