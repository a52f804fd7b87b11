"""The kernels in CUDA C++ for Hopper beside cuBLAS and Triton's: µs, medians, in CUDA graphs, of an 8B model's shapes.

    python benchmarks/gpu_kernels_hopper.py [products] [attention] [--tune]

Weights take turns, so that none is in the level-2 cache. `products`: gate_up by wide.cu, and cuBLAS with what follows;
`attention`: decode.cu and Triton's over an 8-bit cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from gpu_kernels import PRODUCTS, Attention, numbers
from gpu_timing import median_us, run_parts
from torch import Tensor

from tensorweave.kernels.attention import cuda_decode
from tensorweave.kernels.linear.cuda_wide import WideTiling, wide_gated_linear
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs
from tensorweave.kernels.weights import FP8

TILINGS = [
    WideTiling(224, 2),
    WideTiling(224, 1),
    WideTiling(256, 2),
    WideTiling(256, 1),
    WideTiling(192, 2),
    WideTiling(192, 3),
]
ROWS = (136, 192, 256, 320, 384, 448, 512, 640, 768, 1024)
LENGTHS = {
    "450 x 1000 to 2000": [1000 + i * 20 // 9 for i in range(450)],
    "256 x 200": [200] * 256,
    "64 x 1k": [1024] * 64,
}


def library_us(x: Tensor, weights: list[Tensor], out: Tensor) -> float:
    return median_us([partial(lambda w: silu_mul_pairs(F.linear(x, w), out, pdl=True), w) for w in weights], 3)


def wide_us(x: Tensor, weights: list[Tensor], out: Tensor, tiling: WideTiling) -> float:
    return median_us([partial(wide_gated_linear, x, w, out, tiling, pdl=True) for w in weights], 3)


def time_products(tune: bool) -> Iterator[str]:
    outputs, inputs, _ = PRODUCTS["gate_up"]
    weights = [numbers(outputs * 2, inputs) * 0.02 for _ in range(3)]
    for rows in ROWS:
        x, out = numbers(rows, inputs), numbers(rows, outputs)
        parts = [f"cuBLAS and the activation {library_us(x, weights, out):.1f}"]
        for tiling in TILINGS if tune else TILINGS[:2]:
            us = wide_us(x, weights, out, tiling)
            parts.append(f"{tiling.block_n} columns, clusters of {tiling.cluster_m} {us:.1f}")
        yield f"gate_up {rows} rows: {', '.join(parts)}"


def decode_us(case: Attention) -> float:
    shared = {"scale": 0.1, "rotation": case.rotation, "pdl": True}
    return median_us([
        partial(cuda_decode.decode_attention, case.heads, cache, case.table, case.lengths, case.out, **shared)
        for cache in case.caches
    ], 4)  # fmt: skip


def time_attention(tune: bool) -> Iterator[str]:
    for name, lengths in LENGTHS.items():
        case = Attention(lengths)
        case.caches = case.caches.to(FP8)
        yield f"attention {name}, 8 bits: decode.cu {decode_us(case):.1f}, Triton {case.us(1, None):.1f}"


PARTS = {"products": time_products, "attention": time_attention}

if __name__ == "__main__":
    run_parts(__doc__, PARTS)
