"""Whole steps of an 8B model on one GPU out of our Triton kernels: ms, tokens per second, share of the roofline.

    python benchmarks/gpu_step.py [--batches 1 8 32] [--contexts 256 1024] [--no-check] [--no-prefill]

Random weights of Llama-3.1-8B's shape, bfloat16. A decode step is one CUDA graph: embedding, 32 layers, head, greedy
tokens, lengths. The roofline is the bytes of weights and KV at the read rate measured here, or, for the products of
large batches, their operations at the rate of a large product. The check compares logits with a float32 step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from gpu_model import (
    DEVICE,
    EPSILON,
    D,
    H,
    I,
    K,
    L,
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
from gpu_timing import capture, median_ms, relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tensorweave.kernels.attention.tiles import tile_queries
from tensorweave.kernels.attention.triton_decode import DecodeWorkspace, choose_splits, decode_attention
from tensorweave.kernels.attention.triton_prefill import prefill_attention
from tensorweave.kernels.heads.triton import rope_store
from tensorweave.kernels.linear.thin_tiling import GATED, PLAIN, RESIDUAL, choose_tiling
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs, swiglu_linear
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear
from tensorweave.kernels.norm.triton import add_rms_norm, embed
from tensorweave.kernels.sample.rule import TokenTarget
from tensorweave.kernels.sample.triton import SamplingWorkspace, argmax


class DecodeStep:
    """Buffers of one batch size, and the step over them; `run` launches it, on the stream that is current."""

    def __init__(self, model: Model, caches: Tensor, num_rows: int, context: int, *, is_thin: bool) -> None:
        W = -(-(context + 128) // P)
        self.model, self.caches, self.is_thin = model, caches, is_thin
        self.tokens = torch.randint(0, V, (num_rows,), device=DEVICE)
        self.lengths = torch.full((num_rows,), context, dtype=torch.int32, device=DEVICE)
        self.table = torch.randperm(num_rows * W, device=DEVICE).view(num_rows, W).int()
        self.splits = choose_splits(num_rows, K, context)
        self.attention_workspace = DecodeWorkspace.create(num_rows, N, K, H, self.splits, DEVICE)
        self.split_workspace = SplitWorkspace.create(X * H, num_rows, 8, DEVICE)
        self.sampling_workspace = SamplingWorkspace.create(num_rows, DEVICE)
        self.x, self.gained = numbers(num_rows, D), numbers(num_rows, D)
        self.heads, self.attended = numbers(num_rows, X, H), numbers(num_rows, N, H)
        self.gated, self.gate_up = numbers(num_rows, I), numbers(num_rows, 2 * I)
        self.logits = numbers(num_rows, V)
        if is_thin:
            self.output_tiling = choose_tiling(num_rows, D, N * H, RESIDUAL, has_few=True)
            self.down_tiling = choose_tiling(num_rows, D, I, RESIDUAL, has_few=True)
            self.squares = torch.empty(num_rows, self.down_tiling.num_squares(D), device=DEVICE)
            self.mlp_squares = torch.empty(num_rows, self.output_tiling.num_squares(D), device=DEVICE)

    def run(self) -> None:
        if self.is_thin:
            self.run_thin()
        else:
            self.run_wide()

    def attend(self, layer: int) -> None:
        decode_attention(
            self.heads, self.caches[layer], self.table, self.lengths, self.attended, self.attention_workspace,
            scale=H**-0.5, num_splits=self.splits, rotation=self.model.rotation, pdl=True,
        )  # fmt: skip

    def run_thin(self) -> None:
        """Five kernels a layer: norms are folded into the products."""
        rows, heads, attended = len(self.x), self.heads.view(-1, X * H), self.attended.view(-1, N * H)
        scaled = {"squares_MQ": self.squares, "epsilon": EPSILON, "workspace": self.split_workspace, "pdl": True}
        embed(self.tokens, self.model.embedding, self.model.layers[0].norm, self.x, self.gained, self.squares, pdl=True)
        for i, layer in enumerate(self.model.layers):
            after = self.model.layers[i + 1].norm if i + 1 < L else self.model.norm
            thin_linear(
                self.gained, layer.qkv, heads, tiling=choose_tiling(rows, X * H, D, PLAIN, has_few=True), **scaled
            )
            self.attend(i)
            middle = ResidualSum(self.x, layer.mlp_norm, self.gained, self.mlp_squares)
            thin_linear(
                attended, layer.output, middle, tiling=self.output_tiling, workspace=self.split_workspace, pdl=True
            )
            thin_linear(
                self.gained, layer.gate_up, self.gated, is_gated=True, squares_MQ=self.mlp_squares, epsilon=EPSILON,
                tiling=choose_tiling(rows, I, D, GATED, has_few=True), pdl=True,
            )  # fmt: skip
            last = ResidualSum(self.x, after, self.gained, self.squares)
            thin_linear(self.gated, layer.down, last, tiling=self.down_tiling, workspace=self.split_workspace, pdl=True)
        thin_linear(
            self.gained, self.model.head, self.logits, tiling=choose_tiling(rows, V, D, PLAIN, has_few=True), **scaled
        )
        self.pick()

    def run_wide(self) -> None:
        """cuBLAS's products, fused kernels between them."""
        heads, attended, update = self.heads.view(-1, X * H), self.attended.view(-1, N * H), None
        torch.index_select(self.model.embedding, 0, self.tokens, out=self.x)
        for i, layer in enumerate(self.model.layers):
            add_rms_norm(self.x, update, layer.norm, EPSILON, self.gained, pdl=True)
            torch.mm(self.gained, layer.qkv.T, out=heads)
            self.attend(i)
            update = torch.mm(attended, layer.output.T)
            add_rms_norm(self.x, update, layer.mlp_norm, EPSILON, self.gained, pdl=True)
            torch.mm(self.gained, layer.gate_up.T, out=self.gate_up)
            silu_mul_pairs(self.gate_up, self.gated, pdl=True)
            update = torch.mm(self.gated, layer.down.T)
        add_rms_norm(self.x, update, self.model.norm, EPSILON, self.gained, pdl=True)
        torch.mm(self.gained, self.model.head.T, out=self.logits)
        self.pick()

    def pick(self) -> None:
        argmax(self.logits, TokenTarget(self.tokens), self.sampling_workspace, pdl=True)
        self.lengths.add_(1)


class PrefillStep:
    """Fresh prompts of equal length: cuDNN's attention on the keys just computed, or ours over the paged cache."""

    def __init__(self, model: Model, caches: Tensor, num_prompts: int, length: int, *, is_paged: bool) -> None:
        T, W = num_prompts * length, -(-length // P)
        self.model, self.caches, self.is_paged, self.shape = model, caches, is_paged, (num_prompts, length)
        self.tokens = torch.randint(0, V, (T,), device=DEVICE)
        self.table = torch.randperm(num_prompts * W, device=DEVICE).view(num_prompts, W).int()
        self.positions = torch.arange(length, device=DEVICE).repeat(num_prompts)
        self.slots = (self.table.long().repeat_interleave(P, 1)[:, :length] * P).flatten() + self.positions % P
        self.tiles = tile_queries([(i * length, 0, length) for i in range(num_prompts)]).to(DEVICE)
        self.last_rows = torch.arange(1, num_prompts + 1, device=DEVICE) * length - 1
        self.normed, self.gated, self.attended = numbers(T, D), numbers(T, I), numbers(T, N, H)
        self.logits = numbers(num_prompts, V)

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        if self.is_paged:
            prefill_attention(heads[:, :N], self.caches[layer], self.table, self.tiles, self.attended, scale=H**-0.5)
            return self.attended.view(-1, N * H)
        q, k, v = (part.view(*self.shape, -1, H).transpose(1, 2) for part in heads.split([N, K, K], 1))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return (
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                .transpose(1, 2)
                .reshape(-1, N * H)
            )

    def run(self) -> None:
        x, update = self.model.embedding[self.tokens], None
        for i, layer in enumerate(self.model.layers):
            add_rms_norm(x, update, layer.norm, EPSILON, self.normed)
            heads = (self.normed @ layer.qkv.T).view(-1, X, H)
            rope_store(heads, self.caches[i], self.slots, self.positions, self.model.rotation.table_LH)
            update = self.attend(i, heads) @ layer.output.T
            add_rms_norm(x, update, layer.mlp_norm, EPSILON, self.normed)
            swiglu_linear(self.normed, layer.gate_up, self.gated)
            update = self.gated @ layer.down.T
        add_rms_norm(x, update, self.model.norm, EPSILON, self.normed)
        torch.mm(self.normed[self.last_rows], self.model.head.T, out=self.logits)


def measure_rates() -> tuple[float, float]:
    """(bytes per ms of a long read, operations per ms of a large product)."""
    w, x, out = numbers(1 << 19, D), numbers(1, D), numbers(1, 1 << 19)
    read = max(
        w.nbytes / median_ms(lambda: thin_linear(x, w, out)), w.nbytes / median_ms(lambda: w.view(torch.int64).sum())
    )
    a, b = numbers(8192, 8192), numbers(8192, 8192)
    return read, 2 * 8192**3 / median_ms(lambda: a @ b)


def check_decode(model: Model, batches: list[int]) -> Iterator[str]:
    for rows in [b for b in batches if b <= 32]:
        caches = numbers(L, rows * 12, 2 * K, P, H)
        for is_thin in (True, False):
            step = DecodeStep(model, caches, rows, 200, is_thin=is_thin)
            step.lengths -= torch.arange(rows, device=DEVICE, dtype=torch.int32) * 5
            expected = reference_decode(model, caches, step.tokens, step.table, step.lengths)
            step.run()
            error = relative_error(step.logits, expected)
            assert torch.equal(step.tokens, step.logits.float().argmax(-1))
            yield f"check batch {rows} {'thin' if is_thin else 'cuBLAS'}: logits' error against float32 {error:.1e}"


def time_decode(model: Model, rows: int, context: int, read_rate: float, operation_rate: float) -> Iterator[str]:
    kv_bytes = rows * context * L * 2 * K * H * 2
    caches = numbers(L, rows * (-(-(context + 128) // P)), 2 * K, P, H)
    products_ms = max(model.weight_bytes / read_rate, rows * model.weight_bytes / operation_rate)
    roof_ms = products_ms + kv_bytes / read_rate
    for is_thin in [True, False]:
        if is_thin and rows > 128:
            continue
        name = "thin" if is_thin else "cuBLAS"
        yield time_step(DecodeStep(model, caches, rows, context, is_thin=is_thin), context, name, roof_ms)


def time_step(step: DecodeStep, context: int, name: str, roof_ms: float) -> str:
    rows, graph = len(step.x), capture(step.run)
    step.lengths.fill_(context)
    ms = median_ms(graph.replay)
    return (
        f"decode batch {rows:3d} context {context:5d} {name:6s} {ms:7.3f} ms {rows / ms * 1e3:7.0f} tok/s, "
        f"roofline {roof_ms:6.3f} ms, share {roof_ms / ms:.1%}"
    )


def time_prefill(model: Model, operation_rate: float) -> Iterator[str]:
    caches = numbers(L, 8192 // P, 2 * K, P, H)
    for is_paged in (False, True):
        step = PrefillStep(model, caches, 2, 500, is_paged=is_paged)
        step.run()
        error = relative_error(step.logits, reference_prefill(model, step.tokens, *step.shape))
        name = "paged Triton" if is_paged else "cuDNN"
        yield f"check prefill 2 x 500, attention by {name}: logits' error against float32 {error:.1e}"
        for prompts, length in ((4, 2048), (1, 8192)):
            ms = median_ms(PrefillStep(model, caches, prompts, length, is_paged=is_paged).run, 5)
            operations = 8192 * (model.weight_bytes - model.head.nbytes) + 8192 * length * N * H * L * 2
            yield (
                f"prefill {prompts} x {length}, attention by {name}: {ms:.1f} ms, {8192 / ms * 1e3:.0f} tok/s, "
                f"{operations / ms / 1e9:.0f} TFLOP/s, share {operations / operation_rate / ms:.1%}"
            )


def step_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-prefill", action="store_true")
    return parser


def main() -> None:
    options = step_arguments(__doc__).parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    read_rate, operation_rate = measure_rates()
    print(
        f"{torch.cuda.get_device_name()}: read {read_rate / 1e9:.3f} TB/s, product {operation_rate / 1e9:.0f} TFLOP/s"
    )
    model = make_model(max([8192, *options.contexts]) + 256)
    if not options.no_check:
        for line in check_decode(model, options.batches):
            print(line, flush=True)
    for rows in options.batches:
        for context in options.contexts:
            for line in time_decode(model, rows, context, read_rate, operation_rate):
                print(line, flush=True)
            torch.cuda.empty_cache()
    if not options.no_prefill:
        for line in time_prefill(model, operation_rate):
            print(line, flush=True)


if __name__ == "__main__":
    main()
