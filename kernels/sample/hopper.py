"""Tokens from logits on Hopper, by one kernel in CUDA C++: `choose.cu`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, can_run_hopper_kernels, pointer
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
from tensorweave.kernels.sample.triton import TritonSampler

# R rows of logits, V vocabulary

_SOURCE: Final = Path(__file__).with_name("choose.cu")
_CLUSTER: Final = 8
_THREADS: Final = 512
_MAX_NUMBERS: Final = 64
_SHARED_BYTES: Final = 3 * (1024 + 4096) * 4


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("logits", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p), ("top_p", ctypes.c_void_p), ("min_p", ctypes.c_void_p), ("seed", ctypes.c_void_p),
        ("position", ctypes.c_void_p), ("tokens", ctypes.c_void_p), ("slots", ctypes.c_void_p),
        ("newest", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def _kernel(vocab_size: int, dtype: torch.dtype, has_limits: bool, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        return Kernel.load(
            _SOURCE, "choose", dtype, threads=_THREADS, shared_bytes=_SHARED_BYTES if has_limits else 0, V=vocab_size,
            E=_numbers_per_thread(vocab_size), CLUSTER=_CLUSTER, IS_FLOAT32=dtype == torch.float32, LIMITED=has_limits,
        )  # fmt: skip


def _numbers_per_thread(vocab_size: int) -> int:
    return -(-vocab_size // (4 * _CLUSTER * _THREADS)) * 4


def fits(logits_RV: Tensor) -> bool:
    """Whether the kernel is for this device, vocabulary and layout."""
    V = logits_RV.shape[1]
    return (
        can_run_hopper_kernels(logits_RV.device)
        and logits_RV.dtype in (torch.float32, torch.bfloat16)
        and V % 4 == 0
        and _numbers_per_thread(V) <= _MAX_NUMBERS
        and logits_RV.stride(1) == 1
        and logits_RV.stride(0) % 4 == 0
        and logits_RV.data_ptr() % 16 == 0
    )


class HopperSampler:
    """Satisfies `kernels.sample.chosen.Sampler`. Left to Triton's kernels are batches of greedy rows, for which they
    take as long, and other vocabularies and layouts."""

    def __init__(self, device: torch.device) -> None:
        self._others = TritonSampler(device)

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        self._others.argmax(logits_RV, target)

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        if fits(logits_RV):
            choose(logits_RV, parameters, target, has_limits=has_limits)
        else:
            self._others.sample(logits_RV, parameters, target, has_limits=has_limits)


def choose(logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool) -> None:
    """A token per row.

    128,256 tokens in float32, 1 / 64 / 256 rows (H100, 2026-11-27), and by Triton's kernels:

        plain    7.6 / 34 / 105 µs    4.3 / 38 / 125
        min-p    7.7 / 29 / 89        9 / 71 / 212
        top-p    27 / 94 / 300        38 / 250 / 790
        top-k    20 / 69 / 215        41 / 252 / 790
        both     32 / 105 / 338       52 / 270 / 867
    """
    R, V = logits_RV.shape
    assert fits(logits_RV)
    assert target.tokens_R.dtype == torch.int64
    p = parameters
    numbers = (p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, p.seed_R, p.position_R)
    slots, newest = target.slots_R, target.newest_S
    arguments = _Arguments(
        logits_RV.data_ptr(), logits_RV.stride(0), *(each.data_ptr() for each in numbers), target.tokens_R.data_ptr(),
        pointer(slots), pointer(newest),
    )  # fmt: skip
    kernel = _kernel(V, logits_RV.dtype, has_limits, logits_RV.device)
    kernel.launch((_CLUSTER, R), (ctypes.c_void_p * 1)(ctypes.addressof(arguments)))
