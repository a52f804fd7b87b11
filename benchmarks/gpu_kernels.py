"""Each Triton kernel of `kernels/` alone on one GPU, in graphs of many launches over changing buffers: µs, and TB/s or TFLOP/s.

    python benchmarks/gpu_kernels.py [attention linear small sampling prefill] [--tune]

Shapes of Llama-3.1-8B. --tune tries other tilings too; their compilation is spread over processes first.
"""

# ruff: noqa: B023, E501 (launches are timed before the loop goes on; tables of tilings)

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, Job, compile_all, compile_tilings, median_us, run_parts, time_tilings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tensorweave.kernels.attention.tiles import tile_queries
from tensorweave.kernels.attention.triton_decode import DecodeWorkspace, HeadRotation, choose_splits, decode_attention
from tensorweave.kernels.attention.triton_prefill import prefill_attention
from tensorweave.kernels.heads.triton import rope_store
from tensorweave.kernels.linear import thin_tiling as thin
from tensorweave.kernels.linear.thin_tiling import Tiling, choose_tiling
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs, swiglu_linear
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.norm.triton import add_rms_norm
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
from tensorweave.kernels.sample.triton import SamplingWorkspace, argmax, sample

N, K, H, D, WIDTH, V, P = 32, 8, 128, 4096, 14336, 128256, 32
X = N + 2 * K
PRODUCTS = {  # outputs, inputs, epilogue
    "qkv": (X * H, D, thin.PLAIN),
    "o": (D, N * H, thin.RESIDUAL),
    "gate_up": (WIDTH, D, thin.GATED),
    "down": (D, WIDTH, thin.RESIDUAL),
    "head": (V, D, thin.PLAIN),
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


class Attention:
    def __init__(self, lengths: list[int], page: int = P) -> None:
        W = -(-max(lengths) // page) + 1
        blocks = sum(-(-length // page) for length in lengths) + 1
        self.layers = max(2, min(8, int(30e9 / (blocks * 2 * K * page * H * 2))))
        self.caches = numbers(self.layers, blocks, 2 * K, page, H)
        order = torch.randperm(blocks).tolist()
        self.table = torch.zeros(len(lengths), W, dtype=torch.int32)
        for row, length in enumerate(lengths):
            for i in range(-(-length // page)):
                self.table[row, i] = order.pop()
        self.table, self.lengths = self.table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        angles = torch.rand(max(lengths) + 1, H // 2, device=DEVICE)
        self.rotation = HeadRotation(torch.cat([angles.cos(), angles.sin()], -1))
        self.heads, self.out = numbers(len(lengths), X, H), numbers(len(lengths), N, H)

    def us(self, splits: int, tiling: tuple[int, int, int] | None) -> float:
        workspace = DecodeWorkspace.create(len(self.lengths), N, K, H, splits, DEVICE)
        return median_us([
            lambda cache=cache: decode_attention(
                self.heads, cache, self.table, self.lengths, self.out, workspace, scale=H**-0.5, num_splits=splits,
                rotation=self.rotation, tiling=tiling, pdl=True,
            )
            for cache in self.caches
        ], repeats=4)  # fmt: skip


ATTENTION = {
    "1x1k": [1024], "1x8k": [8192], "8x1k": [1024] * 8, "32x1k": [1024] * 32, "64x1k": [1024] * 64, "256x200": [200] * 256,
    "128x1k": [1024] * 128, "300x1500": [1500] * 300, "32x8k": [8192] * 32,
    "64 uneven": [40 + i * 7960 // 63 for i in range(64)], "16k + 63x200": [16384] + [200] * 63,
}  # fmt: skip


def time_attention(tune: bool) -> Iterator[str]:
    for name, lengths in ATTENTION.items():
        case = Attention(lengths)
        kv_bytes = sum(lengths) * 2 * K * H * 2
        best = choose_splits(len(lengths), K, max(lengths), sum(lengths))
        splits = sorted({best, max(1, best // 2), min(32, best * 2)}) if tune else [best]
        for split, tiling in itertools.product(splits, [None, (64, 2, 2), (32, 3, 2), (128, 2, 4)] if tune else [None]):
            us = case.us(split, tiling)
            yield f"attention {name}: {us:.1f} µs, {kv_bytes / us / 1e6:.2f} TB/s, {split} splits, tiling {tiling or 'chosen'}"
        del case
        torch.cuda.empty_cache()


class Product:
    """One product over several weights, so that none is in the level-2 cache."""

    def __init__(self, name: str, rows: int) -> None:
        outputs, inputs, self.epilogue = PRODUCTS[name]
        self.rows, self.outputs, self.inputs = rows, outputs, inputs
        wide = outputs * 2 if self.epilogue == thin.GATED else outputs
        count = max(2, min(16, int(1.2e9 / (wide * inputs * 2))))
        self.weights = [numbers(wide, inputs) * 0.02 for _ in range(count)]
        self.x, self.out, self.gained = numbers(rows, inputs), numbers(rows, outputs), numbers(rows, outputs)
        self.wide_out, self.gain = numbers(rows, wide), numbers(outputs)
        self.squares = torch.rand(rows, 64 if rows > 1 else 1024, device=DEVICE)
        self.workspace = SplitWorkspace.create(max(outputs, D) if outputs < V else D, rows, 8, DEVICE)

    def launch(self, weight: Tensor, tiling: Tiling) -> None:
        shared = {"tiling": tiling, "workspace": self.workspace, "pdl": True}
        if self.epilogue == thin.RESIDUAL:
            squares = torch.empty(self.rows, tiling.num_squares(self.outputs), device=DEVICE)
            thin_linear(self.x, weight, ResidualSum(self.out, self.gain, self.gained, squares), **shared)
        else:
            gated = self.epilogue == thin.GATED
            thin_linear(self.x, weight, self.out, is_gated=gated, squares_MQ=self.squares, epsilon=1.0, **shared)

    def us(self, tiling: Tiling) -> float:
        return median_us([lambda w=w: self.launch(w, tiling) for w in self.weights], 2)

    def library_us(self) -> float:
        return median_us([lambda w=w: torch.mm(self.x, w.T, out=self.wide_out) for w in self.weights], 2)


def tilings(name: str, rows: int) -> list[Tiling]:
    chosen = choose_tiling(rows, *PRODUCTS[name])
    if rows == 1:
        cuts = {
            "qkv": [(2, 512, 2), (2, 2048, 4), (4, 1024, 4), (4, 2048, 8), (1, 4096, 4), (8, 512, 4)],
            "o": [(4, 2048, 8), (2, 2048, 4), (8, 1024, 8), (4, 1024, 4), (16, 512, 8), (4, 4096, 8)],
            "gate_up": [(1, 2048, 4), (2, 2048, 8), (1, 4096, 4), (2, 1024, 4), (4, 1024, 8), (1, 1024, 2)],
            "down": [(4, 2048, 8), (2, 2048, 4), (8, 1024, 8), (4, 1024, 4), (16, 512, 8), (8, 2048, 8)],
            "head": [(8, 1024, 8), (4, 2048, 8), (2, 2048, 4), (8, 2048, 8)],
        }
        return [chosen, *(Tiling(0, *cut) for cut in cuts[name])]
    m = max(16, 1 << (rows - 1).bit_length())
    cuts = {  # BN, BK, warps, stages, splits
        "qkv": [(64, 128, 4, 5, 1), (64, 128, 4, 3, 1), (64, 128, 4, 4, 2), (64, 64, 4, 6, 2), (64, 64, 4, 8, 1), (128, 64, 4, 5, 2)],
        "o": [(64, 128, 4, 3, 4), (64, 128, 4, 3, 2), (64, 128, 4, 4, 2), (64, 64, 4, 6, 4), (64, 64, 4, 4, 8)],
        "gate_up": [(64, 128, 4, 5, 1), (64, 128, 4, 4, 1), (64, 128, 4, 3, 1), (64, 64, 4, 6, 1), (64, 64, 4, 4, 1)],
        "down": [(64, 128, 4, 6, 2), (64, 128, 4, 4, 2), (64, 128, 4, 4, 4), (64, 128, 4, 3, 4), (64, 64, 4, 6, 4), (128, 64, 4, 5, 8)],
        "head": [(128, 128, 4, 4, 1), (64, 128, 4, 5, 1), (64, 128, 4, 3, 1), (128, 64, 4, 6, 1), (128, 64, 4, 4, 1)],
    }  # fmt: skip
    return [chosen, *(Tiling(m, *cut) for cut in cuts[name] if shared_bytes(m, name, *cut) < 225_000)]


def shared_bytes(m: int, name: str, block_n: int, block_k: int, warps: int, stages: int, splits: int) -> int:
    return stages * block_k * 2 * (m + block_n * (2 if name == "gate_up" else 1))


def compile_products(job: Job) -> None:
    compile_tilings(job, Product, tilings(*job))


def time_linear(tune: bool) -> Iterator[str]:
    jobs = list(itertools.product(PRODUCTS, (1, 8, 32, 64, 128)))
    if tune:
        compile_all(compile_products, jobs)
    for name, rows in jobs:
        product = Product(name, rows)
        chosen = choose_tiling(rows, *PRODUCTS[name], has_few=True)
        times, problems = time_tilings((name, rows), product, [chosen, *(tilings(name, rows) if tune else [])])
        yield from problems
        us, weight_bytes, library = times[chosen], product.weights[0].nbytes, product.library_us()
        yield f"{name:8s} {rows:3d} rows: {us:6.1f} µs, {weight_bytes / us / 1e6:.2f} TB/s; cuBLAS {library:6.1f}"
        for tiling in sorted(times, key=times.__getitem__)[:4]:
            cut = (tiling.block_n, tiling.block_k, tiling.warps, tiling.stages, tiling.splits)
            yield f"    {times[tiling]:6.1f} µs {cut}"
        del product
        torch.cuda.empty_cache()


def time_small(tune: bool) -> Iterator[str]:
    for rows in (1, 32, 256, 8192):
        x, out, gain = numbers(rows, D), numbers(rows, D), numbers(D)
        updates = [numbers(rows, D) for _ in range(8)]
        us = median_us([lambda u=u: add_rms_norm(x, u, gain, 1e-5, out, pdl=True) for u in updates], 4)
        yield f"add_rms_norm {rows} rows: {us:.2f} µs, {rows * D * 8 / us / 1e6:.2f} TB/s"
        heads, cache = [numbers(rows, X, H) for _ in range(4)], numbers(rows // P + 1, 2 * K, P, H)
        slots, positions = torch.randperm(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
        table = torch.rand(rows, H, device=DEVICE)
        us = median_us([lambda h=h: rope_store(h, cache, slots, positions, table, pdl=True) for h in heads], 4)
        moved = rows * H * 2 * (X + N + K + 2 * K)
        yield f"rope_store {rows} rows: {us:.2f} µs, {moved / us / 1e6:.2f} TB/s"
        if rows >= 256:
            gate_up, gated = [numbers(rows, 2 * WIDTH) for _ in range(2)], numbers(rows, WIDTH)
            us = median_us([lambda g=g: silu_mul_pairs(g, gated, pdl=True) for g in gate_up], 4)
            yield f"silu_mul_pairs {rows} rows: {us:.2f} µs, {rows * WIDTH * 6 / us / 1e6:.2f} TB/s"


def time_sampling(tune: bool) -> Iterator[str]:
    for rows in (1, 8, 64, 256):
        each = [numbers(rows, V) * 2 for _ in range(4)]
        out, workspace = TokenTarget.create(rows, DEVICE), SamplingWorkspace.create(rows, DEVICE)
        ones, ids = torch.ones(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
        kinds = {
            "gumbel": (0, 1.0, 0.0), "min-p": (0, 1.0, 0.1), "top-p 0.9": (0, 0.9, 0.0), "top-k 50": (50, 1.0, 0.0),
            "top-k 50 + top-p 0.9": (50, 0.9, 0.0),
        }  # fmt: skip
        us = median_us([lambda x=x: argmax(x, out, workspace, pdl=True) for x in each], 4)
        yield f"argmax {rows} rows: {us:.1f} µs; torch {median_us([lambda x=x: x.argmax(-1) for x in each], 4):.1f}"
        for kind, (k, p, min_p) in kinds.items():
            parameters = SamplingParameters(ones, (ones * k).int(), ones * p, ones * min_p, ids, ids.int())
            limited = kind != "gumbel"
            us = median_us(
                [lambda x=x: sample(x, parameters, out, workspace, has_limits=limited, pdl=True) for x in each], 4
            )
            yield f"{kind} {rows} rows: {us:.1f} µs"


PREFILL_TILINGS = [None, (64, 3, 8), (64, 2, 8), (128, 2, 8), (64, 2, 4), (32, 4, 4)]


def time_prefill(tune: bool) -> Iterator[str]:
    for name, chunks in {
        "4x2048": [(0, 2048)] * 4, "1x8192": [(0, 8192)], "16x1000": [(0, 1000)] * 16, "2048 after 6144": [(6144, 2048)],
        "1x8192 window 1024": [(0, 8192)],
    }.items():  # fmt: skip
        for page, tiling in itertools.product((32, 64), PREFILL_TILINGS if tune else [None]):
            tokens, W = sum(length for _, length in chunks), -(-max(sum(chunk) for chunk in chunks) // page)
            cache = numbers(len(chunks) * W, 2 * K, page, H)
            table = torch.randperm(len(chunks) * W, device=DEVICE).view(len(chunks), W).int()
            rows = [0, *itertools.accumulate(length for _, length in chunks)]
            tiles = tile_queries([(row, *chunk) for row, chunk in zip(rows, chunks, strict=False)]).to(DEVICE)
            heads, out = numbers(tokens, X, H), numbers(tokens, N, H)
            window = 1024 if "window" in name else None
            us = median_us([
                lambda: prefill_attention(heads[:, :N], cache, table, tiles, out, scale=H**-0.5, window=window, tiling=tiling)
            ], 2)  # fmt: skip
            seen = sum(length * (start + length / 2) for start, length in chunks) if window is None else tokens * window
            yield f"prefill attention {name}, page {page}, tiling {tiling or 'chosen'}: {us:.0f} µs, {4 * seen * N * H / us / 1e6:.0f} TFLOP/s"
    q = numbers(4, N, 2048, H)
    k, v = numbers(4, K, 2048, H), numbers(4, K, 2048, H)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        us = median_us([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)])
    yield f"cuDNN 4x2048: {us:.0f} µs, {4 * 4 * 2048 * 1024 * N * H / us / 1e6:.0f} TFLOP/s"
    for rows in (256, 512, 2048, 8192):
        x, w, out, wide = numbers(rows, D), numbers(2 * WIDTH, D), numbers(rows, WIDTH), numbers(rows, 2 * WIDTH)
        us = median_us([lambda: swiglu_linear(x, w, out)], 4)
        library = median_us([lambda: torch.mm(x, w.T, out=wide)], 4)
        operations = 4 * rows * D * WIDTH
        yield (
            f"swiglu_linear {rows} rows: {us:.0f} µs, {operations / us / 1e6:.0f} TFLOP/s; cuBLAS without activation "
            f"{library:.0f} µs, {operations / library / 1e6:.0f} TFLOP/s"
        )


PARTS = {
    "attention": time_attention,
    "linear": time_linear,
    "small": time_small,
    "sampling": time_sampling,
    "prefill": time_prefill,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
