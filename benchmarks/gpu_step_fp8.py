"""Whole steps of gpu_step.py's 8B model in FP8: 8-bit weights with a scale per output, rows quantized per token.

    python benchmarks/gpu_step_fp8.py [--batches 1 8 32] [--contexts 256] [--kv auto fp8] [--no-check] [--no-prefill]

The head stays in bfloat16. `thin` quantizes in the products, `scaled` is torch's scaled product with what quantizes
for it. Checks compare logits with float32 steps: of the same 8-bit weights and rows, and of the bfloat16 model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_model import (
    DEVICE,
    EPSILON,
    D,
    H,
    I,
    K,
    L,
    Layer,
    Model,
    N,
    P,
    V,
    X,
    make_model,
    numbers,
    reference_decode,
    reference_prefill,
)
from gpu_step import DecodeStep, PrefillStep, measure_rates, step_arguments, time_step
from gpu_timing import median_ms, relative_error
from torch import Tensor

from tensorweave.kernels.attention.triton_decode import decode_attention
from tensorweave.kernels.heads.triton import rope_store
from tensorweave.kernels.linear.quantized import QuantizedRows, UnscaledProduct, scaled_linear, unscaled_linear
from tensorweave.kernels.linear.thin_tiling import GATED, PLAIN, RESIDUAL, choose_quantized_tiling, choose_tiling
from tensorweave.kernels.linear.triton_quantize import make_peaks, quantize
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs
from tensorweave.kernels.linear.triton_thin import ResidualSum, thin_linear
from tensorweave.kernels.norm.triton import add_rms_norm, embed
from tensorweave.kernels.weights import FP8, QuantizedWeight, quantize_weight

PRODUCTS = ("qkv", "output", "gate_up", "down")
MOST_THIN_ROWS = 128


def quantized(model: Model) -> Model:
    layers = [
        replace(layer, **{name: quantize_weight(getattr(layer, name)) for name in PRODUCTS}) for layer in model.layers
    ]
    return replace(model, layers=layers)


class QuantizedDecodeStep(DecodeStep):
    def __init__(self, model: Model, caches: Tensor, num_rows: int, context: int, *, is_thin: bool) -> None:
        super().__init__(model, caches, num_rows, context, is_thin=is_thin)
        self.peaks = make_peaks(L + 1, 4, num_rows, device=DEVICE)
        self.ones, self.update = torch.ones((), device=DEVICE), numbers(num_rows, D)
        self.normed8, self.attended8, self.gated8 = (
            QuantizedRows.empty(num_rows, width, DEVICE) for width in (D, N * H, I)
        )
        if is_thin:
            self.output_tiling = choose_quantized_tiling(num_rows, D, N * H, RESIDUAL)
            self.down_tiling = choose_quantized_tiling(num_rows, D, I, RESIDUAL)
            self.squares = torch.empty(num_rows, self.down_tiling.num_squares(D), device=DEVICE)
            self.mlp_squares = torch.empty(num_rows, self.output_tiling.num_squares(D), device=DEVICE)

    def attend_with_peaks(self, layer: int, peaks: Tensor | None) -> None:
        decode_attention(
            self.heads, self.caches[layer], self.table, self.lengths, self.attended, self.attention_workspace,
            scale=H**-0.5, num_splits=self.splits, rotation=self.model.rotation, peaks_RA=peaks, pdl=True,
        )  # fmt: skip

    def run_thin(self) -> None:
        rows, heads, attended = len(self.x), self.heads.view(-1, X * H), self.attended.view(-1, N * H)
        scaled = {"squares_MQ": self.squares, "epsilon": EPSILON, "workspace": self.split_workspace, "pdl": True}
        shared = {"workspace": self.split_workspace, "pdl": True}
        self.peaks.zero_()
        first = self.model.layers[0].norm
        embed(
            self.tokens, self.model.embedding, first, self.x, self.gained, self.squares, peaks_TA=self.peaks[0, 0],
            pdl=True,
        )  # fmt: skip
        for i, layer in enumerate(self.model.layers):
            after = self.model.layers[i + 1].norm if i + 1 < len(self.model.layers) else self.model.norm
            peaks = self.peaks[i]
            thin_linear(
                self.gained, layer.qkv, heads, tiling=choose_quantized_tiling(rows, X * H, D, PLAIN), peaks_MA=peaks[0],
                **scaled,
            )  # fmt: skip
            self.attend_with_peaks(i, peaks[1])
            middle = ResidualSum(self.x, layer.mlp_norm, self.gained, self.mlp_squares)
            thin_linear(
                attended, layer.output, middle, tiling=self.output_tiling, peaks_MA=peaks[1], out_peaks_MA=peaks[2],
                **shared,
            )  # fmt: skip
            thin_linear(
                self.gained, layer.gate_up, self.gated, is_gated=True, squares_MQ=self.mlp_squares, epsilon=EPSILON,
                tiling=choose_quantized_tiling(rows, I, D, GATED), peaks_MA=peaks[2], out_peaks_MA=peaks[3], pdl=True,
            )  # fmt: skip
            last = ResidualSum(self.x, after, self.gained, self.squares)
            thin_linear(
                self.gated, layer.down, last, tiling=self.down_tiling, peaks_MA=peaks[3],
                out_peaks_MA=self.peaks[i + 1, 0], **shared,
            )  # fmt: skip
        thin_linear(
            self.gained, self.model.head, self.logits, tiling=choose_tiling(rows, V, D, PLAIN, has_few=True), **scaled
        )
        self.pick()

    def run_wide(self) -> None:
        heads, attended = self.heads.view(-1, X * H), self.attended.view(-1, N * H)
        update: UnscaledProduct | None = None
        torch.index_select(self.model.embedding, 0, self.tokens, out=self.x)
        for i, layer in enumerate(self.model.layers):
            add_rms_norm(self.x, update, layer.norm, EPSILON, self.normed8, pdl=True)
            scaled_linear(self.normed8, layer.qkv, heads)
            self.attend_with_peaks(i, None)
            quantize(attended, self.attended8, pdl=True)
            update = unscaled_linear(self.attended8, layer.output, self.ones, self.update)
            add_rms_norm(self.x, update, layer.mlp_norm, EPSILON, self.normed8, pdl=True)
            silu_mul_pairs(unscaled_linear(self.normed8, layer.gate_up, self.ones, self.gate_up), self.gated8, pdl=True)
            update = unscaled_linear(self.gated8, layer.down, self.ones, self.update)
        add_rms_norm(self.x, update, self.model.norm, EPSILON, self.gained, pdl=True)
        torch.mm(self.gained, self.model.head.T, out=self.logits)
        self.pick()


class QuantizedPrefillStep(PrefillStep):
    def __init__(self, model: Model, caches: Tensor, num_prompts: int, length: int, *, is_paged: bool) -> None:
        super().__init__(model, caches, num_prompts, length, is_paged=is_paged)
        T = num_prompts * length
        self.normed8, self.attended8, self.gated8 = (QuantizedRows.empty(T, width, DEVICE) for width in (D, N * H, I))
        self.ones, self.update, self.gate_up = torch.ones((), device=DEVICE), numbers(T, D), numbers(T, 2 * I)
        self.last = numbers(num_prompts, D)

    def run(self) -> None:
        x, update = self.model.embedding[self.tokens], None
        for i, layer in enumerate(self.model.layers):
            add_rms_norm(x, update, layer.norm, EPSILON, self.normed8)
            heads = scaled_linear(self.normed8, layer.qkv).view(-1, X, H)
            rope_store(heads, self.caches[i], self.slots, self.positions, self.model.rotation.table_LH)
            quantize(self.attend(i, heads), self.attended8)
            update = unscaled_linear(self.attended8, layer.output, self.ones, self.update)
            add_rms_norm(x, update, layer.mlp_norm, EPSILON, self.normed8)
            silu_mul_pairs(unscaled_linear(self.normed8, layer.gate_up, self.ones, self.gate_up), self.gated8)
            update = unscaled_linear(self.gated8, layer.down, self.ones, self.update)
        add_rms_norm(x, update, self.model.norm, EPSILON, self.normed)
        torch.mm(self.normed[self.last_rows], self.model.head.T, out=self.logits)


def numbers8(*shape: int) -> Tensor:
    out = torch.empty(*shape, dtype=FP8, device=DEVICE)
    for part in out:
        part.copy_(numbers(*shape[1:]))
    return out


def make_caches(kv: str, num_blocks: int) -> Tensor:
    return (numbers8 if kv == "fp8" else numbers)(L, num_blocks, 2 * K, P, H)


def check_decode(plain: Model, model: Model, batches: list[int], kv: str) -> Iterator[str]:
    """Of two layers: in more of random weights, each number that falls on e4m3's other side changes all that follow."""
    plain, model = (replace(m, layers=m.layers[:2]) for m in (plain, model))
    for rows in [b for b in batches if b <= 32]:
        for is_thin in (True, False):
            caches = make_caches(kv, rows * 12)
            step = QuantizedDecodeStep(model, caches, rows, 200, is_thin=is_thin)
            step.lengths -= torch.arange(rows, device=DEVICE, dtype=torch.int32) * 5
            at = (step.tokens, step.table, step.lengths)
            expected, unquantized = reference_decode(model, caches, *at), reference_decode(plain, caches, *at)
            step.run()
            assert torch.equal(step.tokens, step.logits.float().argmax(-1))
            yield (
                f"check batch {rows} {'thin' if is_thin else 'scaled'}, KV {kv}: logits' error "
                f"{relative_error(step.logits, expected):.1e}, against the bfloat16 model "
                f"{relative_error(step.logits, unquantized):.1e}"
            )


def time_decode(model: Model, rows: int, context: int, kv: str, read_rate: float) -> Iterator[str]:
    caches = make_caches(kv, rows * (-(-(context + 128) // P)))
    kv_bytes = rows * context * L * 2 * K * H * caches.element_size()
    weight_bytes = model.head.nbytes + sum(
        weight_of(layer, name).values_NK.nbytes for layer in model.layers for name in PRODUCTS
    )
    roof_ms = (weight_bytes + kv_bytes) / read_rate
    for is_thin in [True, False]:
        if is_thin and rows > MOST_THIN_ROWS:
            continue
        name = f"{'thin' if is_thin else 'scaled'}, KV {kv}"
        yield time_step(QuantizedDecodeStep(model, caches, rows, context, is_thin=is_thin), context, name, roof_ms)


def weight_of(layer: Layer, name: str) -> QuantizedWeight:
    weight = getattr(layer, name)
    assert isinstance(weight, QuantizedWeight)
    return weight


def time_prefill(plain: Model, model: Model, kv: str) -> Iterator[str]:
    caches = make_caches(kv, 8192 // P)
    for is_paged in (False, True):
        two_layers = [replace(m, layers=m.layers[:2]) for m in (model, plain)]
        step = QuantizedPrefillStep(two_layers[0], caches, 2, 500, is_paged=is_paged)
        step.run()
        errors = [relative_error(step.logits, reference_prefill(m, step.tokens, *step.shape)) for m in two_layers]
        name = "paged Triton" if is_paged else "cuDNN"
        yield (
            f"check prefill 2 x 500, attention by {name}: logits' error {errors[0]:.1e}, against the bfloat16 model "
            f"{errors[1]:.1e}"
        )
        for prompts, length in ((4, 2048), (1, 8192)):
            ms = median_ms(QuantizedPrefillStep(model, caches, prompts, length, is_paged=is_paged).run, 5)
            yield f"prefill {prompts} x {length}, attention by {name}: {ms:.1f} ms, {8192 / ms * 1e3:.0f} tok/s"


def main() -> None:
    parser = step_arguments(__doc__)
    parser.add_argument("--kv", nargs="+", default=["auto", "fp8"], choices=["auto", "fp8"])
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    read_rate, _ = measure_rates()
    print(f"{torch.cuda.get_device_name()}: read {read_rate / 1e9:.3f} TB/s")
    plain = make_model(max([8192, *options.contexts]) + 256)
    model = quantized(plain)
    for kv in options.kv:
        if not options.no_check:
            for line in check_decode(plain, model, options.batches, kv):
                print(line, flush=True)
        for rows in options.batches:
            for context in options.contexts:
                for line in time_decode(model, rows, context, kv, read_rate):
                    print(line, flush=True)
                torch.cuda.empty_cache()
    if not options.no_prefill:
        for line in time_prefill(plain, model, options.kv[0]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
