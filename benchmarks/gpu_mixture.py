"""A layer's mixture of experts on one GPU, in graphs of several launches with other routings: µs, TB/s or TFLOP/s.

    python benchmarks/gpu_mixture.py [decode prefill small] [--tune]

The shape of Qwen3-30B-A3B: 128 experts of 768, of which 8 are chosen, 2,048 wide, bfloat16. Bytes are those of the
experts that are hit. --tune tries other tilings of one product, the other's as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from gpu_timing import DEVICE, median_us, run_parts

from tensorweave.kernels.compile_ahead import compile_ahead
from tensorweave.kernels.linear.triton_thin import ResidualSum
from tensorweave.kernels.mixture.routing import Routing
from tensorweave.kernels.mixture.routing import route as reference_route
from tensorweave.kernels.mixture.stack import ExpertStack
from tensorweave.kernels.mixture.tiling import ExpertTiling, MixtureTilings
from tensorweave.kernels.mixture.triton import RoutedPairs, add_experts, choose_tilings, num_squares, route

E, S, D, WIDTH = 128, 8, 2048, 768
ROUTINGS = 6  # one after the other in a graph, so that experts of one token are not in the level-2 cache
MOST_SHARED = 227 * 1024


class Mixture:
    """Of a number of tokens: as in a decode step of few rows to 128, beyond that as in other steps."""

    def __init__(self, stack: ExpertStack, num_tokens: int) -> None:
        self.stack, self.num_tokens = stack, num_tokens
        self.is_scaled = num_tokens <= 128
        self.x = torch.randn(num_tokens, D, device=DEVICE).bfloat16()
        self.logits = [torch.randn(num_tokens, E, device=DEVICE).bfloat16() for _ in range(ROUTINGS)]
        self.residual, self.gained = torch.randn_like(self.x), torch.empty_like(self.x)
        self.gain = torch.rand(D, device=DEVICE).bfloat16()
        self.squares = torch.rand(num_tokens, 32, device=DEVICE) * D / 32
        self.tilings = choose_tilings(num_tokens, stack, is_scaled=self.is_scaled)

    @property
    def hit_bytes(self) -> float:
        """Mean bytes of the experts that are hit."""
        hits = [len(reference_route(logits, self.stack.routing)[0].unique()) for logits in self.logits]
        return sum(hits) / len(hits) * 3 * D * WIDTH * 2

    def launches(self, tilings: MixtureTilings) -> list[Callable[[], None]]:
        found = torch.empty(self.num_tokens, num_squares(D, tilings), device=DEVICE)
        out = ResidualSum(self.residual, self.gain, self.gained, found) if self.is_scaled else self.residual
        squares = self.squares if self.is_scaled else None
        return [
            lambda logits=logits: add_experts(
                self.x, logits, self.stack, out, tilings, squares_TQ=squares, epsilon=1e-6, pdl=True
            )
            for logits in self.logits
        ]

    def us(self, tilings: MixtureTilings) -> float:
        return median_us(self.launches(tilings))


def make_stack() -> ExpertStack:
    gate_up = torch.empty(E, 2 * WIDTH, D, device=DEVICE, dtype=torch.bfloat16).normal_(std=0.02)
    down = torch.empty(E, D, WIDTH, device=DEVICE, dtype=torch.bfloat16).normal_(std=0.02)
    return ExpertStack(gate_up, down, Routing(S, is_renormalized=True, is_rounded=True))


def candidates(mixture: Mixture) -> Iterator[MixtureTilings]:
    """The chosen tilings, then those with another for one of the products."""
    chosen = mixture.tilings
    yield chosen
    if not chosen.gated.block_m:
        for n, k, warps in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8)):
            yield replace(chosen, gated=ExpertTiling(0, n, k, warps, 1))
        for n, k, warps in itertools.product((1, 2, 4, 8), (256, 1024), (2, 4, 8)):
            yield replace(chosen, down=ExpertTiling(0, n, k, warps, 1))
    elif chosen.gated.is_wide:
        wide = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
                (128, 128, 64, 8, 3), (64, 256, 64, 8, 4), (64, 256, 64, 4, 4), (128, 192, 64, 8, 4)]  # fmt: skip
        for each in wide:
            yield replace(chosen, gated=ExpertTiling(*each, True))
            yield replace(chosen, down=ExpertTiling(*each, True))
        yield from _few(MixtureTilings(ExpertTiling(128, 64, 64, 4, 4), ExpertTiling(128, 128, 64, 4, 4)), (128,))
    else:
        yield from _few(chosen, (chosen.gated.block_m,))


def _few(chosen: MixtureTilings, rows: Sequence[int]) -> Iterator[MixtureTilings]:
    blocks = ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128))
    for m, (n, k), stages, warps in itertools.product(rows, blocks, (3, 4, 6), (4, 8)):
        weight, x = n * k * 2, m * k * 2
        if warps == 8 and n < 128:
            continue
        if 48 * 1024 <= stages * (2 * weight + x) <= MOST_SHARED:
            yield replace(chosen, gated=ExpertTiling(m, n, k, warps, stages))
        if 36 * 1024 <= stages * (weight + x) <= MOST_SHARED:
            yield replace(chosen, down=ExpertTiling(m, n, k, warps, stages))


def time_mixtures(num_tokens: Sequence[int], tune: bool) -> Iterator[str]:
    stack = make_stack()
    for T in num_tokens:
        mixture = Mixture(stack, T)
        tried = list(dict.fromkeys(candidates(mixture))) if tune else [mixture.tilings]
        compile_ahead(lambda m=mixture, tried=tried: [run() for each in tried for run in m.launches(each)[:1]])
        times: dict[MixtureTilings, float] = {}
        for tilings in tried:
            try:
                times[tilings] = mixture.us(tilings)
            except Exception as error:
                yield f"{T} tokens {tilings}: {error!r:.120}"
        us, hit_bytes, operations = times[mixture.tilings], mixture.hit_bytes, 6.0 * T * S * D * WIDTH
        yield f"{T:5d} tokens: {us:7.1f} µs, {hit_bytes / us / 1e6:.2f} TB/s, {operations / us / 1e6:.0f} TFLOP/s"
        for name in ("gated", "down") if tune else ():
            tried_ones = [(us, getattr(t, name)) for t, us in times.items() if _differs_in(t, mixture.tilings, name)]
            found = sorted(tried_ones, key=lambda pair: pair[0])
            best = [f"{us:.1f} {_text(tiling)}" for us, tiling in found[:5]]
            yield f"      {name} (chosen {_text(getattr(mixture.tilings, name))}): {'; '.join(best)}"


def _differs_in(tilings: MixtureTilings, chosen: MixtureTilings, name: str) -> bool:
    return getattr(tilings, name) != getattr(chosen, name)


def _text(tiling: ExpertTiling) -> str:
    kind = "wide " if tiling.is_wide else ""
    return f"{kind}({tiling.block_m}, {tiling.block_n}, {tiling.block_k}, {tiling.warps}, {tiling.stages})"


def decode(tune: bool) -> Iterator[str]:
    return time_mixtures((1, 8, 32, 256) if tune else (1, 2, 8, 16, 32, 64, 128, 256), tune)


def prefill(tune: bool) -> Iterator[str]:
    return time_mixtures((1024, 8192) if tune else (512, 1024, 2048, 8192), tune)


def small(tune: bool) -> Iterator[str]:
    """Routing and grouping alone."""
    stack = make_stack()
    for T in (1, 32, 256, 8192):
        logits, pairs = torch.randn(T, E, device=DEVICE).bfloat16(), RoutedPairs.empty(T, stack, DEVICE)
        alone = median_us([lambda g=logits, p=pairs: route(g, stack, p, is_grouped=False, pdl=True)], 10)
        both = median_us([lambda g=logits, p=pairs: route(g, stack, p, pdl=True)], 10)
        yield f"{T:5d} tokens: routing {alone:.1f} µs, with grouping {both:.1f} µs"


if __name__ == "__main__":
    run_parts(__doc__, {"small": small, "decode": decode, "prefill": prefill})
