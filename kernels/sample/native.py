"""Tokens from logits by the native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensorweave.kernels.native.library import NativeKernels
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget

# R rows of logits, V vocabulary


@dataclass(frozen=True, slots=True)
class NativeSampler:
    """Satisfies `kernels.sample.chosen.Sampler`, for contiguous float32 logits on the CPU."""

    native: NativeKernels

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        """16 rows of 49,152: 0.065 ms on one thread (EPYC; torch's argmax takes 0.44 ms)."""
        assert self.native.argmax is not None
        _check(logits_RV, target)
        self.native.argmax(logits_RV.data_ptr(), target.tokens_R.data_ptr(), *logits_RV.shape)
        target.leave_newest()

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        assert self.native.sample is not None
        _check(logits_RV, target)
        p = parameters
        numbers = (p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, p.seed_R, p.position_R)
        pointers = [each.data_ptr() for each in numbers]
        self.native.sample(logits_RV.data_ptr(), *pointers, target.tokens_R.data_ptr(), *logits_RV.shape)
        target.leave_newest()


def _check(logits_RV: Tensor, target: TokenTarget) -> None:
    assert logits_RV.dtype == torch.float32
    assert logits_RV.is_contiguous()
    assert target.tokens_R.dtype == torch.int64
