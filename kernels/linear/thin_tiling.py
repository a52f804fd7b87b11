"""How a product of few rows is cut into blocks: see `triton_thin`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tensorweave.kernels.linear.cuda_few import FEW_OUTPUTS, MAX_FEW_ROWS

PLAIN, GATED, RESIDUAL = 0, 1, 2
"""What follows the product."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut: blocks of `block_n` rows of the weight, `block_k` of its columns at a time.

    block_m 0: one row of x, by a kernel without the matrix unit. Less than 64 rows of the weight in a block: by warps'
    matrix instructions, for few rows of x; 64 or more: by wgmma, and then K may be split over several blocks.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int = 1
    splits: int = 1

    def num_squares(self, num_outputs: int) -> int:
        """Sums of squares per row that a product with a `ResidualSum` writes."""
        return -(-num_outputs // self.block_n)


FEW_TILING: Final = Tiling(MAX_FEW_ROWS, FEW_OUTPUTS, 64, 8)
"""By the kernel in CUDA C++, see `cuda_few`."""


def choose_tiling(num_rows: int, num_outputs: int, num_inputs: int, epilogue: int, *, has_few: bool = False) -> Tiling:
    """Measured best on an H100 for the shapes of an 8B model (benchmarks/gpu_kernels.md); a guess elsewhere.

    `has_few`: whether CUDA C++ kernels for Hopper can be compiled (`kernels.cuda.program`). They are not for 1 row, of
    which a step would take 5.30 rather than 5.09 ms.
    """
    if has_few and 1 < num_rows <= MAX_FEW_ROWS and num_inputs % 64 == 0:
        return FEW_TILING
    if num_rows == 1:
        wide = min(2048, _largest_power(num_inputs))
        if epilogue == GATED:
            return Tiling(0, 1, wide, 4)
        return Tiling(0, 2, wide, 4) if epilogue == PLAIN and num_outputs < 65536 else Tiling(0, 4, wide, 8)
    if num_rows <= 16 and num_outputs < 65536:
        if num_rows <= 8:
            return Tiling(8, 16, 512, 4, 4) if epilogue == PLAIN else Tiling(8, 16, 1024, 4, 3)
        return Tiling(16, 16, 512, 4, 3 if epilogue == PLAIN else 4)
    block_m = max(16, _next_power(num_rows))
    assert block_m <= 128, "a thin product has at most 128 rows"
    # So many stages that two or three blocks (to 16 rows), or one, fit on a multiprocessor: the early blocks of a
    # dependent launch would pile up on the first that fall free (a step of 8 rows took 6.4 rather than 5.8 ms).
    is_widest = block_m == 128
    if num_outputs >= 65536:
        return Tiling(block_m, 128, 64, 4, 6) if is_widest else Tiling(block_m, 128, 128, 4, 4)
    if epilogue == GATED:
        return Tiling(block_m, 64, 128, 4, 3 if is_widest else 4)
    if epilogue == RESIDUAL:
        splits = 2 if is_widest or num_inputs > 2 * num_outputs else 1
        return Tiling(block_m, 64, 128, 4, 4 if is_widest else 6, splits)
    return Tiling(block_m, 64, 128, 4, 5 if block_m == 16 else 4)


def choose_quantized_tiling(num_rows: int, num_outputs: int, num_inputs: int, epilogue: int) -> Tiling:
    """The same for a `QuantizedWeight`, measured inside a whole step."""
    is_long = num_inputs > 2 * num_outputs
    if num_rows == 1:
        width = min(2048 if is_long else 1024, _largest_power(num_inputs))
        if epilogue == GATED:
            return Tiling(0, 4, width, 2)
        return Tiling(0, 4 if is_long else 8, width, 4)
    block_m = max(16, _next_power(num_rows))
    assert block_m <= 128, "a thin product has at most 128 rows"
    splits = 2 if epilogue == RESIDUAL else 1
    if block_m == 128:
        return Tiling(block_m, 64, 128, 4, 3 if epilogue == GATED else 4, splits)
    if epilogue == GATED:
        return Tiling(block_m, 64, 256, 4, 2)
    if epilogue == RESIDUAL and block_m == 16:
        return Tiling(block_m, 64, 512, 4, 3, splits)
    stages = {16: 4, 32: 5, 64: 4 if is_long else 3}[block_m]
    return Tiling(block_m, 64, 256, 4, stages, splits)


def _largest_power(number: int) -> int:
    """The largest power of two that divides the number; 512 if that is less, and the kernel masks the rest."""
    return max(number & -number, 512)


def _next_power(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
