"""Tokens from logits on the device: greedy, or Gumbel-max with temperature, min-p, top-k and top-p. Called once a step.

Gumbel-max (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030): argmax over tokens of logit / temperature + g, where g
is a Gumbel number from hash(seed, position, token). No sum over the vocabulary, nothing that depends on the batch.

Thresholds are exact on integers: with z = (largest - logit) / temperature, a token's key is floor(z * 2¹⁷), at most
2²² - 1, and its mass round(exp(-z) * 2²⁶). Histograms of keys, 2,048 coarse bins and then 2,048 fine ones in the bin
where the threshold lies, hold count and mass in one int64, so that the order of the additions does not matter.

    min-p   keeps keys up to that of the probability min_p times the largest
    top-k   of those, keeps keys up to that of the k-th token; tokens of equal key stay together
    top-p   of those, keeps the keys before which less than top_p of the mass lies
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from tensorweave.kernels.sample.triton_kernels import BINS, draw, finish, histogram, maxima

# R rows of logits, V vocabulary, Y chunks of a row, each of one program

_BLOCK: Final = 4096
_ARGMAX_BLOCK: Final = 8192
_MAX_CHUNKS: Final = 32


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """Parts of a row's chunks, and histograms, which stay zero between calls. Calls in stream order may share it."""

    scores: Tensor
    places: Tensor
    maxima: Tensor
    bins: Tensor
    found: Tensor
    arrived: Tensor

    @classmethod
    def create(cls, max_rows: int, device: torch.device) -> SamplingWorkspace:
        count = max_rows * _MAX_CHUNKS
        return cls(
            torch.empty(count, dtype=torch.float32, device=device),
            torch.empty(count, dtype=torch.int32, device=device),
            torch.empty(count, dtype=torch.float32, device=device),
            torch.zeros(max_rows * 3 * BINS, dtype=torch.int64, device=device),
            torch.empty(max_rows * 2, dtype=torch.int32, device=device),
            torch.zeros(max_rows, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """A number per row, on the device.

    temperature float32, 0: greedy (say so for top-k 1 too); top_k int32, 0: off; top_p float32, 1: off; min_p float32,
    0: off; seed int64; position int64, the place in its sequence of the token that is drawn.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor


def argmax(logits_RV: Tensor, out_R: Tensor, workspace: SamplingWorkspace, *, pdl: bool = False) -> None:
    """The first place of each row's largest number; NO_PLACE where the row holds NaN, or its largest is infinite.

    128,256 tokens, 1 / 64 / 256 rows: 3.1 / 14 / 36 µs (torch's 26 / 39 / 47; H100, 2026-11-26).
    """
    R, V = logits_RV.shape
    chunks, chunk = _cut(R, V, _ARGMAX_BLOCK)
    draw[(R, chunks)](
        logits_RV, *(None,) * 8, workspace.scores, workspace.places, V, logits_RV.stride(0), chunk,
        Y=chunks, SAMPLED=False, LIMITED=False, BLOCK=_ARGMAX_BLOCK, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    finish[(R,)](
        workspace.scores, workspace.places, workspace.bins, out_R, Y=chunks, LIMITED=False, PDL=pdl, num_warps=1,
        launch_pdl=pdl,
    )  # fmt: skip


def sample(
    logits_RV: Tensor,
    parameters: SamplingParameters,
    out_R: Tensor,
    workspace: SamplingWorkspace,
    *,
    has_limits: bool,
    pdl: bool = False,
) -> None:
    """A token per row by the rule at the top of this file; NO_PLACE as `argmax` has it.

    128,256 tokens, 1 / 64 / 256 rows (H100, 2026-11-26): plain 4.7 / 39 / 133 µs, min-p 9 / 65 / 224, top-p 36 / 241 /
    814, top-k and top-p 49 / 270 / 892. The histogram's additions in the level-2 cache bound the last two.

    Args:
        logits_RV: bfloat16 or float32, edited already; -inf: a banned token.
        has_limits: whether any row has min-p, top-k or top-p; False spares four passes.
    """
    R, V = logits_RV.shape
    chunks, chunk = _cut(R, V, _BLOCK)
    p = parameters
    cut = (V, logits_RV.stride(0), chunk)
    options = {"Y": chunks, "BLOCK": _BLOCK, "PDL": pdl, "num_warps": 8, "launch_pdl": pdl}
    if has_limits:
        maxima[(R, chunks)](logits_RV, workspace.maxima, *cut, **options)
        for level in range(3):
            histogram[(R, chunks)](
                logits_RV, workspace.maxima, workspace.bins, workspace.found, workspace.arrived,
                p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, *cut, LEVEL=level, **options,
            )  # fmt: skip
    draw[(R, chunks)](
        logits_RV, workspace.maxima, workspace.found, p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, p.seed_R,
        p.position_R, workspace.scores, workspace.places, *cut, SAMPLED=True, LIMITED=has_limits, **options,
    )  # fmt: skip
    finish[(R,)](
        workspace.scores, workspace.places, workspace.bins, out_R, Y=chunks, LIMITED=has_limits, PDL=pdl, num_warps=4,
        launch_pdl=pdl,
    )  # fmt: skip


def _cut(num_rows: int, vocab_size: int, block: int) -> tuple[int, int]:
    """Chunks per row, a power of two, about 1,056 programs in all; numbers per chunk, whole blocks."""
    blocks = triton.cdiv(vocab_size, block)
    wanted = max(1, min(1056 // num_rows, blocks, _MAX_CHUNKS))
    chunks = 1 << (wanted.bit_length() - 1)
    return chunks, triton.cdiv(blocks, chunks) * block
