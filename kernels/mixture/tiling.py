"""How the products of a mixture of experts are cut into blocks: see `kernels.mixture.triton`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertTiling:
    """Blocks of `block_m` pairs, `block_n` outputs and `block_k` inputs at a time; `block_m` 0: one token, by kernels
    without the matrix unit. `is_wide`: rows are the left operand, and a program computes one tile of them; else the
    weight is, and a program computes all rows of its expert."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class MixtureTilings:
    gated: ExpertTiling
    down: ExpertTiling


def choose_mixture_tilings(
    num_tokens: int,
    num_chosen: int,
    num_experts: int,
    *,
    can_be_one: bool,
    can_be_wide: bool,
    itemsize: int,
) -> MixtureTilings:
    """For this many tokens. An expert that is chosen has about T S / E rows, and seldom more than twice as many.

    `can_be_one`, `can_be_wide`: whether kernels for one token and for many can be called. `itemsize`: bytes of
    a number; 256 bytes of a row at a time fit into shared memory with four stages.
    """
    if num_tokens == 1 and can_be_one:
        return MixtureTilings(ExpertTiling(0, 1, 1024, 4, 1), ExpertTiling(0, 4, 1024, 2, 1))
    mean = num_tokens * num_chosen / num_experts
    if mean > 64 and can_be_wide:
        return MixtureTilings(ExpertTiling(128, 256, 64, 8, 3, True), ExpertTiling(128, 128, 64, 8, 4, True))
    block_m = 16
    while block_m < min(2 * mean, 64):
        block_m *= 2
    tiling = ExpertTiling(block_m, 64, 256 // itemsize, 4, 4)
    return MixtureTilings(tiling, tiling)
