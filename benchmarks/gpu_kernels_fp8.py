"""FP8 kernels alone on one GPU: products with 8-bit weights, what quantizes for them, attention over an 8-bit KV cache.

    python benchmarks/gpu_kernels_fp8.py [thin wide small attention] [--tune]

As gpu_kernels.py, whose shapes and clock it uses. --tune tries other tilings too.
"""

# ruff: noqa: B023 (launches are timed before the loop goes on)

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from operator import itemgetter

import torch
from gpu_kernels import ATTENTION, PRODUCTS, WIDTH, Attention, D, H, K, P, X, numbers
from gpu_timing import DEVICE, Job, compile_all, compile_tilings, median_us, run_parts, time_tilings
from torch import Tensor

from tensorweave.kernels.attention.triton_decode import choose_splits
from tensorweave.kernels.heads.triton import rope_store
from tensorweave.kernels.linear import thin_tiling as thin
from tensorweave.kernels.linear.quantized import QuantizedRows, UnscaledProduct, scaled_linear, unscaled_linear
from tensorweave.kernels.linear.thin_tiling import Tiling, choose_quantized_tiling
from tensorweave.kernels.linear.triton_quantize import make_peaks, quantize
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.norm.triton import add_rms_norm
from tensorweave.kernels.weights import FP8, QuantizedWeight, quantize_rows

BLOCKS = {name: shape for name, shape in PRODUCTS.items() if name != "head"}


def random_weight(outputs: int, inputs: int) -> QuantizedWeight:
    values, scales = quantize_rows(numbers(outputs, inputs))
    return QuantizedWeight(values, scales * 0.02, torch.bfloat16)


class Product:
    """One product over several weights, so that none is in the level-2 cache."""

    def __init__(self, name: str, rows: int, count: int = 12) -> None:
        outputs, inputs, self.epilogue = BLOCKS[name]
        self.rows, self.outputs, self.inputs = rows, outputs, inputs
        self.wide = outputs * 2 if self.epilogue == thin.GATED else outputs
        self.weights = [random_weight(self.wide, inputs) for _ in range(count)]
        self.x, self.out, self.gained = numbers(rows, inputs), numbers(rows, outputs), numbers(rows, outputs)
        self.gain, self.squares = numbers(outputs), torch.rand(rows, 64 if rows > 1 else 1024, device=DEVICE)
        self.workspace = SplitWorkspace.create(outputs, rows, 8, DEVICE)
        self.peaks, self.out_peaks = make_peaks(rows, device=DEVICE), make_peaks(rows, device=DEVICE)
        self.peaks[:, 0] = self.x.abs().amax(1).float().view(torch.int32)

    @property
    def weight_bytes(self) -> int:
        return self.weights[0].values_NK.nbytes

    def launch(self, weight: QuantizedWeight, tiling: Tiling) -> None:
        shared = {"tiling": tiling, "workspace": self.workspace, "peaks_MA": self.peaks, "pdl": True}
        if self.epilogue == thin.RESIDUAL:
            squares = torch.empty(self.rows, tiling.num_squares(self.outputs), device=DEVICE)
            result = ResidualSum(self.out, self.gain, self.gained, squares)
            thin_linear(self.x, weight, result, out_peaks_MA=self.out_peaks, **shared)
            return
        gated = self.epilogue == thin.GATED
        thin_linear(
            self.x, weight, self.out, is_gated=gated, squares_MQ=self.squares, epsilon=1.0,
            out_peaks_MA=self.out_peaks if gated else None, **shared,
        )  # fmt: skip

    def us(self, tiling: Tiling) -> float:
        return median_us([lambda w=w: self.launch(w, tiling) for w in self.weights], 2)

    def library_us(self, *, is_scaled: bool) -> float:
        rows, out, ones = QuantizedRows(*quantize_rows(self.x)), numbers(self.rows, self.wide), ones_scalar()
        if is_scaled:
            return median_us([lambda w=w: scaled_linear(rows, w, out) for w in self.weights], 2)
        return median_us([lambda w=w: unscaled_linear(rows, w, ones, out) for w in self.weights], 2)


def ones_scalar() -> Tensor:
    return torch.ones((), device=DEVICE)


def tilings(name: str, rows: int) -> list[Tiling]:
    chosen = choose_quantized_tiling(rows, *BLOCKS[name])
    if rows == 1:
        cuts = {
            "qkv": [(2, 4096, 4), (4, 2048, 4), (4, 4096, 8), (8, 1024, 4), (8, 2048, 8), (2, 1024, 2), (4, 1024, 4)],
            "o": [(2, 4096, 4), (4, 2048, 4), (4, 4096, 8), (8, 1024, 4), (8, 2048, 8), (4, 1024, 4)],
            "gate_up": [(1, 4096, 4), (2, 4096, 8), (2, 2048, 8), (4, 2048, 8), (2, 1024, 4), (4, 1024, 4)],
            "down": [(4, 2048, 4), (4, 2048, 8), (8, 2048, 8), (8, 1024, 8), (4, 1024, 4), (8, 1024, 4), (2, 2048, 4)],
        }
        return [chosen, *(Tiling(0, *cut) for cut in cuts[name])]
    few = []
    if rows <= 8:
        few = [Tiling(8, 16, 1024, 4, 3), Tiling(8, 16, 1024, 4, 4), Tiling(8, 32, 512, 4, 4)]
    m = max(16, 1 << (rows - 1).bit_length())
    cuts = [(64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (64, 256, 4, 4), (64, 256, 4, 5), (64, 512, 4, 2)]
    if name == "gate_up":
        cuts = [(64, 128, 4, 4), (64, 128, 4, 5), (64, 128, 4, 3), (64, 256, 4, 2), (64, 256, 4, 3), (128, 128, 8, 4)]
    splits = [1] if name in ("gate_up",) else [1, 2] if name == "qkv" else [1, 2, 4]
    wide = [Tiling(m, *cut, split) for cut in cuts for split in splits]
    return [chosen, *few, *(tiling for tiling in wide if shared_bytes(name, tiling) < 225_000)]


def shared_bytes(name: str, tiling: Tiling) -> int:
    """x comes in bfloat16 and is 8-bit beside that."""
    weight = tiling.block_n * (2 if name == "gate_up" else 1)
    return tiling.block_k * (tiling.stages * (2 * tiling.block_m + weight) + tiling.block_m)


def compile_products(job: Job) -> None:
    compile_tilings(job, lambda name, rows: Product(name, rows, count=1), tilings(*job))


def time_thin(tune: bool) -> Iterator[str]:
    jobs = list(itertools.product(BLOCKS, (1, 8, 16, 32, 64, 128)))
    if tune:
        compile_all(compile_products, jobs)
    for name, rows in jobs:
        product, chosen = Product(name, rows), choose_quantized_tiling(rows, *BLOCKS[name])
        times, problems = time_tilings((name, rows), product, [chosen, *(tilings(name, rows) if tune else [])])
        yield from problems
        best = " ".join(
            f"{times[t]:.1f}:{t.block_n},{t.block_k},{t.warps},{t.stages},{t.splits}"
            for t in sorted(times, key=times.__getitem__)[:4]
        )
        us = times[chosen]
        yield f"{name:8s} {rows:3d} rows: {us:6.1f} µs, {product.weight_bytes / us / 1e6:.2f} TB/s; {best}"
        del product
        torch.cuda.empty_cache()


def time_wide(tune: bool) -> Iterator[str]:
    for name, rows in itertools.product(BLOCKS, (64, 128, 256, 512, 2048, 8192)):
        product = Product(name, rows, count=6)
        scaled, unscaled = (product.library_us(is_scaled=is_scaled) for is_scaled in (True, False))
        operations = 2 * rows * product.weight_bytes
        yield (
            f"{name:8s} {rows:4d} rows: scaled {scaled:7.1f} µs {operations / scaled / 1e6:5.0f} TFLOP/s, "
            f"unscaled {unscaled:7.1f} µs {operations / unscaled / 1e6:5.0f} TFLOP/s"
        )


def time_small(tune: bool) -> Iterator[str]:
    for rows in (1, 32, 256, 8192):
        x, gain, out = numbers(rows, D), numbers(D), QuantizedRows.empty(rows, D, DEVICE)
        factors = torch.rand(rows, device=DEVICE), torch.rand(D, device=DEVICE)
        updates = [UnscaledProduct(numbers(rows, D) * 0.01, *factors) for _ in range(8)]
        us = median_us([lambda u=u: add_rms_norm(x, u, gain, 1e-5, out, pdl=True) for u in updates], 4)
        yield f"add_rms_norm to 8 bits, {rows} rows: {us:.2f} µs, {rows * D * 7 / us / 1e6:.2f} TB/s"
        each = [numbers(rows, D) for _ in range(4)]
        us = median_us([lambda e=e: quantize(e, out, pdl=True) for e in each], 4)
        yield f"quantize {rows} rows: {us:.2f} µs, {rows * D * 3 / us / 1e6:.2f} TB/s"
        products = [
            UnscaledProduct(numbers(rows, 2 * WIDTH), factors[0], torch.rand(2 * WIDTH, device=DEVICE))
            for _ in range(3)
        ]
        gated = QuantizedRows.empty(rows, WIDTH, DEVICE)
        us = median_us([lambda p=p: silu_mul_pairs(p, gated, pdl=True) for p in products], 4)
        yield f"silu_mul_pairs to 8 bits, {rows} rows: {us:.2f} µs, {rows * WIDTH * 5 / us / 1e6:.2f} TB/s"
        heads, cache = [numbers(rows, X, H) for _ in range(4)], numbers(rows // P + 1, 2 * K, P, H).to(FP8)
        slots, positions = torch.randperm(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
        table = torch.rand(rows, H, device=DEVICE)
        us = median_us([lambda h=h: rope_store(h, cache, slots, positions, table, pdl=True) for h in heads], 4)
        yield f"rope_store to 8 bits, {rows} rows: {us:.2f} µs"


TILINGS = [(64, 2, 2), (64, 3, 2), (64, 2, 4), (64, 3, 4), (32, 3, 2), (128, 2, 4), (128, 3, 4), (128, 2, 8)]


def compile_attention(job: tuple[int, int]) -> None:
    rows, splits = job
    case = Attention([100] * rows)
    case.caches = case.caches.to(FP8)
    for tiling in TILINGS:
        case.us(splits, tiling)


def time_attention(tune: bool) -> Iterator[str]:
    if tune:
        with multiprocessing.get_context("spawn").Pool(12) as pool:
            pool.map(compile_attention, [*itertools.product((1, 9), (1, 2, 4, 8, 16, 32))], chunksize=1)
    for name, lengths in ATTENTION.items():
        case = Attention(lengths)
        wide = case.us(choose_splits(len(lengths), K, max(lengths), sum(lengths)), None)
        case.caches = case.caches.to(FP8)
        best = choose_splits(len(lengths), K, max(lengths), sum(lengths))
        results = []
        for splits in sorted({best, max(1, best // 2), min(32, best * 2)}) if tune else [best]:
            results += [(case.us(splits, tiling), splits, tiling) for tiling in (TILINGS if tune else [None])]
        kv_bytes = sum(lengths) * 2 * K * H
        us = min(result[0] for result in results)
        text = " ".join(f"{us:.1f}:{splits},{tiling}" for us, splits, tiling in sorted(results, key=itemgetter(0))[:4])
        yield f"attention {name}, 8-bit KV: {us:.1f} µs, {kv_bytes / us / 1e6:.2f} TB/s; bfloat16 {wide:.1f} µs; {text}"
        del case
        torch.cuda.empty_cache()


PARTS = {"thin": time_thin, "wide": time_wide, "small": time_small, "attention": time_attention}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
