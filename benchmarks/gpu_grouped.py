"""Products with codes of 4 and 8 bits in groups on one GPU, in graphs over several weights: µs, TB/s of what is read.

    python benchmarks/gpu_grouped.py [few many]

Shapes of Llama-3.1-8B, groups of 128 inputs, scales of 16 bits, bfloat16 rows.
"""

# ruff: noqa: B023 (launches are timed before the loop goes on)

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from gpu_timing import DEVICE, median_us, run_parts

from tensorweave.kernels.grouped_float_weight import GroupedFloatWeight
from tensorweave.kernels.grouped_weight import GroupedWeight
from tensorweave.kernels.linear.cuda_grouped import dequantize, grouped_linear
from tensorweave.kernels.linear.triton_thin import ResidualSum, thin_linear
from tensorweave.kernels.packed_codes import PackedCodes

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GROUP = 128


def make(N: int, K: int, bits: Literal[4, 8], kind: str) -> PackedCodes:
    codes = torch.randint(0, 256, (N, K if bits == 8 else K // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(N, K // GROUP, device=DEVICE).mul(0.01).half()
    if kind == "float":
        codes &= 0x7E  # no code that is not a number
        return PackedCodes.of(GroupedFloatWeight(codes, scales.float(), K, GROUP, "e4m3", torch.bfloat16))
    zero = 1 << (bits - 1)
    offsets = scales.float() * torch.randint(-8, 8, scales.shape, device=DEVICE) if kind == "zeros" else None
    return PackedCodes.of(GroupedWeight(codes, scales, offsets, K, GROUP, bits, zero, torch.bfloat16))


def few(tune: bool) -> Iterator[str]:
    for bits, kind in ((4, ""), (4, "zeros"), (8, ""), (8, "float")):
        for name, (N, K) in SHAPES.items():
            num_weights = max(2, 128 * 1024 * 1024 // (N * K * bits // 8))
            weights = [make(N, K, bits, kind) for _ in range(num_weights)]
            found = []
            for M in (1, 2, 8, 16):
                x, out = torch.randn(M, K, device=DEVICE).bfloat16(), torch.empty(M, N, device=DEVICE).bfloat16()
                gained, squares = torch.empty_like(out), torch.empty(M, N // 16, device=DEVICE)
                half = torch.empty(M, N // 2, device=DEVICE).bfloat16()
                residual = ResidualSum(out, torch.ones(N, device=DEVICE).bfloat16(), gained, squares)
                is_gated = name == "gate_up"
                to = half if is_gated else residual if name in ("o", "down") else out
                us = median_us([lambda w=w: thin_linear(x, w, to, is_gated=is_gated, pdl=True) for w in weights])
                found.append(f"{M}: {us:.1f} ({weights[0].records.nbytes / us / 1e6:.2f})")
            yield f"{bits} bits {kind:5s} {name:7s} {', '.join(found)}"


def many(tune: bool) -> Iterator[str]:
    """Of more rows: some at a time; dequantizing, and the product of 16-bit weights beside it."""
    for name, (N, K) in SHAPES.items():
        weights = [make(N, K, 4, "") for _ in range(max(2, 128 * 1024 * 1024 // (N * K // 2)))]
        dequantized = median_us([lambda w=w: dequantize(w) for w in weights[:3]])
        parts = [f"dequantize {dequantized:.0f}"]
        for M in (32, 64, 128, 256):
            x, out = torch.randn(M, K, device=DEVICE).bfloat16(), torch.empty(M, N, device=DEVICE).bfloat16()
            us = median_us([lambda w=w: grouped_linear(x, w, out, pdl=True) for w in weights])
            plain = [dequantize(w) for w in weights[:3]]
            parts.append(
                f"{M}: {us:.0f} (16 bits {median_us([lambda w=w: torch.mm(x, w.T, out=out) for w in plain]):.0f})"
            )
        yield f"{name:7s} {', '.join(parts)}"


if __name__ == "__main__":
    run_parts(__doc__, {"few": few, "many": many})
