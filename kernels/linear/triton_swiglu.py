"""The gated half of an MLP for many rows: silu(x gateᵀ) * (x upᵀ), the activation in the product's epilogue."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

# M rows, I intermediate width, K inputs; blocks of BM, BN, BK

_BM, _BN, _BK, _STAGES, _WARPS = 128, 256, 64, 3, 8
_TILES_PER_GROUP = 16  # tiles of rows that share what they read of the weight


@triton.jit(do_not_specialize=["M"])
def _swiglu_linear(
    x_desc, w_desc, out_desc, M,
    WIDTH: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(2 * WIDTH, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        rows = tl.minimum(tiles_m - first, GROUP)
        at_m = (first + tile % (GROUP * tiles_n) % rows) * BM
        at_n = tile % (GROUP * tiles_n) // rows * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            acc = tl.dot(x_desc.load([at_m, k]), w_desc.load([at_n, k]).T, acc)
        gate, up = tl.split(acc.reshape(BM, BN // 2, 2))  # neighbours, in one thread: no exchange
        out_desc.store([at_m, at_n // 2], (gate / (1 + tl.exp(-gate)) * up).to(out_desc.dtype))


@triton.jit
def _gate(x_ptr, out_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    both_at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    both = tl.load(x_ptr + both_at, mask=both_at < 2 * count, other=0.0)
    gate, up = tl.split(both.to(tl.float32).reshape(BLOCK, 2))
    tl.store(out_ptr + at, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=at < count)


def swiglu_linear(x_MK: Tensor, weight_2IK: Tensor, out_MI: Tensor) -> None:
    """silu(x gateᵀ) * (x upᵀ), bfloat16 with float32 sums; rows of the weight alternate gate and up.

    Alternating rows put a gate and its up into one thread; as two halves of the weight with two accumulators, 536
    rather than 690 to 737 TFLOP/s (8,192 x 28,672 x 4,096, H100, 2026-11-26). All contiguous, at 16 bytes.
    """
    M, K = x_MK.shape
    I = out_MI.shape[1]  # noqa: E741
    assert weight_2IK.shape == (2 * I, K)
    assert x_MK.is_contiguous()
    assert weight_2IK.is_contiguous()
    assert out_MI.is_contiguous()
    if not M:
        return
    programs = torch.cuda.get_device_properties(x_MK.device).multi_processor_count
    _swiglu_linear[(min(programs, triton.cdiv(M, _BM) * triton.cdiv(2 * I, _BN)),)](
        TensorDescriptor.from_tensor(x_MK, [_BM, _BK]),
        TensorDescriptor.from_tensor(weight_2IK, [_BN, _BK]),
        TensorDescriptor.from_tensor(out_MI, [_BM, _BN // 2]),
        M, WIDTH=I, K=K, BM=_BM, BN=_BN, BK=_BK, GROUP=_TILES_PER_GROUP, STAGES=_STAGES,
        PROGRAMS=programs, num_warps=_WARPS,
    )  # fmt: skip


def interleave_gate_up(gate_IK: Tensor, up_IK: Tensor) -> Tensor:
    """[2 I, K] with rows that alternate gate and up, as `swiglu_linear` and `thin_linear` read them."""
    return torch.stack([gate_IK, up_IK], 1).flatten(0, 1)


def silu_mul_pairs(gate_up_M2I: Tensor, out_MI: Tensor, *, pdl: bool = False) -> None:
    """silu(gate) * up where the product was another library's: columns alternate gate and up. Contiguous."""
    assert gate_up_M2I.is_contiguous()
    assert out_MI.is_contiguous()
    assert gate_up_M2I.numel() == 2 * out_MI.numel()
    if not out_MI.numel():
        return
    BLOCK = 1024
    _gate[(triton.cdiv(out_MI.numel(), BLOCK),)](
        gate_up_M2I, out_MI, out_MI.numel(), BLOCK=BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
