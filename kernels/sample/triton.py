"""Tokens from logits on a GPU: greedy, and drawn by the rule of `kernels.sample.rule`. Called once a step.

Histograms of keys, 2,048 coarse bins and then 2,048 fine ones in the bin where the threshold lies, hold count and mass
in one int64, so that the order of the additions does not matter.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
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


class TritonSampler:
    """Satisfies `kernels.sample.chosen.Sampler`. Calls may be captured in CUDA graphs, after one of the same size."""

    def __init__(self, device: torch.device) -> None:
        self._pdl = torch.cuda.get_device_capability(device) >= (9, 0)
        self._max_rows = 64
        self._workspaces = [SamplingWorkspace.create(self._max_rows, device)]

    def argmax(self, logits_RV: Tensor, target: TokenTarget) -> None:
        argmax(logits_RV, target, self._workspace_of(logits_RV), pdl=self._pdl)

    def sample(
        self, logits_RV: Tensor, parameters: SamplingParameters, target: TokenTarget, *, has_limits: bool
    ) -> None:
        workspace = self._workspace_of(logits_RV)
        sample(logits_RV, parameters, target, workspace, has_limits=has_limits, pdl=self._pdl)

    def _workspace_of(self, logits_RV: Tensor) -> SamplingWorkspace:
        """The newest; graphs may use the ones before."""
        if len(logits_RV) > self._max_rows:
            self._max_rows = triton.next_power_of_2(len(logits_RV))
            self._workspaces.append(SamplingWorkspace.create(self._max_rows, logits_RV.device))
        return self._workspaces[-1]


def argmax(logits_RV: Tensor, target: TokenTarget, workspace: SamplingWorkspace, *, pdl: bool = False) -> None:
    """The first place of each row's largest number.

    128,256 tokens, 1 / 64 / 256 rows: 3.1 / 14 / 36 µs (torch's 26 / 39 / 47; H100, 2026-11-26).
    """
    R = len(logits_RV)
    chunks = draw_scores(logits_RV, None, 0, workspace, pdl=pdl)
    finish[(R,)](
        workspace.scores, workspace.places, workspace.bins, *_pointers(target), Y=chunks, LIMITED=False,
        HAS_SLOTS=target.slots_R is not None, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip


def sample(
    logits_RV: Tensor,
    parameters: SamplingParameters,
    target: TokenTarget,
    workspace: SamplingWorkspace,
    *,
    has_limits: bool,
    pdl: bool = False,
) -> None:
    """A token per row.

    128,256 tokens, 1 / 64 / 256 rows (H100, 2026-11-26): plain 4.7 / 39 / 133 µs, min-p 9 / 65 / 224, top-p 36 / 241 /
    814, top-k and top-p 49 / 270 / 892. The histogram's additions in the level-2 cache bound the last two; `hopper` has
    them in shared memory.

    Args:
        logits_RV: bfloat16 or float32, edited already; -inf: a banned token.
        has_limits: whether any row has min-p, top-k or top-p; False spares four passes.
    """
    R, V = logits_RV.shape
    assert V < 1 << 19
    assert logits_RV.stride(1) == 1
    chunks, chunk = _cut(R, V, _BLOCK)
    p = parameters
    cut = (V, logits_RV.stride(0), chunk)
    options = {"Y": chunks, "BLOCK": _BLOCK, "PDL": pdl, "num_warps": 8, "launch_pdl": pdl}
    if not has_limits:
        draw_scores(logits_RV, p, 0, workspace, pdl=pdl)
    else:
        maxima[(R, chunks)](logits_RV, workspace.maxima, *cut, **options)
        for level in range(3):
            histogram[(R, chunks)](
                logits_RV, workspace.maxima, workspace.bins, workspace.found, workspace.arrived,
                p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, *cut, LEVEL=level, **options,
            )  # fmt: skip
        draw[(R, chunks)](
            logits_RV, workspace.maxima, workspace.found, p.temperature_R, p.top_k_R, p.top_p_R, p.min_p_R, p.seed_R,
            p.position_R, workspace.scores, workspace.places, *cut, 0, SAMPLED=True, LIMITED=True, **options,
        )  # fmt: skip
    finish[(R,)](
        workspace.scores, workspace.places, workspace.bins, *_pointers(target), Y=chunks, LIMITED=has_limits,
        HAS_SLOTS=target.slots_R is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def draw_scores(
    logits_RV: Tensor, parameters: SamplingParameters | None, first: int, workspace: SamplingWorkspace, *, pdl: bool
) -> int:
    """Leave the best score of each chunk of each row, without limits, and its place in the row, in the workspace.
    Return the number of chunks. `parameters` None: all rows are greedy. `first` is the id of the first column's token.
    """
    R, V = logits_RV.shape
    assert logits_RV.stride(1) == 1
    p, block = parameters, _ARGMAX_BLOCK if parameters is None else _BLOCK
    chunks, chunk = _cut(R, V, block)
    temperature, seed, position = (None,) * 3 if p is None else (p.temperature_R, p.seed_R, p.position_R)
    draw[(R, chunks)](
        logits_RV, None, None, temperature, None, None, None, seed, position, workspace.scores, workspace.places,
        V, logits_RV.stride(0), chunk, first, Y=chunks, SAMPLED=p is not None, LIMITED=False, BLOCK=block, PDL=pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return chunks


def _pointers(target: TokenTarget) -> tuple[Tensor | None, ...]:
    return target.tokens_R, target.slots_R, target.newest_S


def _cut(num_rows: int, vocab_size: int, block: int) -> tuple[int, int]:
    """Chunks per row, a power of two, about 1,056 programs in all; numbers per chunk, whole blocks."""
    blocks = triton.cdiv(vocab_size, block)
    wanted = max(1, min(1056 // num_rows, blocks, _MAX_CHUNKS))
    chunks = 1 << (wanted.bit_length() - 1)
    return chunks, triton.cdiv(blocks, chunks) * block
