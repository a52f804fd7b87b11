"""Products of 1 to 16 rows on Hopper, with what follows them: `few.cu`, a form of `thin_linear`, see there.

A row has the same bits whatever the number of rows and whatever the others are. From 2 rows on it is the fastest form.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, pointer
from tensorweave.kernels.lora.update import MAX_COLUMNS, LowRankUpdate, outputs_fit

# M rows of x, N rows of the weight, K inputs, Q sums of squares per row of x

FEW_OUTPUTS: Final = 16
"""Rows of the weight in a tile: a sum of squares of the residual covers so many outputs."""
MAX_FEW_ROWS: Final = 16
_SOURCE: Final = Path(__file__).with_name("few.cu")
_PLAIN, _GATED, _RESIDUAL = 0, 1, 2
_THREADS, _WARPS, _STAGE_BYTES = 288, 8, 16 * (1024 + 64)
_STAGES: Final = {1: 6, 2: 5}
"""By groups of 8 rows: two blocks fit on a multiprocessor."""
_BLOCKS: Final = 2

Residual = tuple[Tensor, Tensor, Tensor, Tensor]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "x", "squares", "bias", "out", "residual", "gained", "gain")),
        ("squares_out", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("num_squares", ctypes.c_int),
        ("M", ctypes.c_int), ("N", ctypes.c_int), ("K", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("b", "low", "places")),
        *((name, ctypes.c_int) for name in ("LR", "R", "P", "first", "second", "reads_early")),
    ]  # fmt: skip


@cache
def _kernel(
    epilogue: int, is_scaled: bool, has_bias: bool, is_wide: bool, is_adapted: bool, row_groups: int,
    dtype: torch.dtype, device: torch.device,
) -> Kernel:  # fmt: skip
    stages = _STAGES[row_groups]
    constants = {
        "EPILOGUE": epilogue, "SCALED": is_scaled, "BIAS": has_bias, "WIDE_OUT": is_wide, "NT": row_groups,
        "STAGES": stages, "ADAPTED": is_adapted,
    }  # fmt: skip
    sums_bytes = 4 * (2 * _WARPS * 16 * (row_groups * 8 + 1) + row_groups * 8)
    shared_bytes = stages * (_STAGE_BYTES + 16) + sums_bytes + 128
    with torch.cuda.device(device):
        return Kernel.load(_SOURCE, "few", dtype, threads=_THREADS, shared_bytes=shared_bytes, **constants)


@cache
def _num_blocks(device: torch.device) -> int:
    return _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count


def few_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    out_MN: Tensor | None,
    *,
    is_gated: bool = False,
    bias_N: Tensor | None = None,
    squares_MQ: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Residual | None = None,
    update: LowRankUpdate | None = None,
    pdl: bool = False,
) -> None:
    """See `thin_linear`. K a multiple of 64; parts of an update begin at multiples of `FEW_OUTPUTS`. `residual` has the
    fields of a `ResidualSum`, and then there is no `out_MN`, which else has the type of x or is float32."""
    M, K = x_MK.shape
    N = weight_NK.shape[0]
    assert 1 <= M <= MAX_FEW_ROWS
    assert K % 64 == 0
    arguments = _Arguments(
        weight_NK.data_ptr(), x_MK.data_ptr(), pointer(squares_MQ), pointer(bias_N), pointer(out_MN),
        epsilon=epsilon, num_squares=0 if squares_MQ is None else squares_MQ.shape[1], M=M, N=N, K=K,
    )  # fmt: skip
    if residual is not None:
        residual_MN, gain_N, gained_MN, squares_out = residual
        arguments.residual, arguments.gain = residual_MN.data_ptr(), gain_N.data_ptr()
        arguments.gained, arguments.squares_out = gained_MN.data_ptr(), squares_out.data_ptr()
    if update is not None:
        _add_update(arguments, update, is_gated=is_gated)
    epilogue = _RESIDUAL if residual is not None else _GATED if is_gated else _PLAIN
    is_wide = out_MN is not None and out_MN.dtype == torch.float32
    row_groups = 1 if M <= 8 else 2
    forms = epilogue, squares_MQ is not None, bias_N is not None, is_wide, update is not None, row_groups
    kernel = _kernel(*forms, x_MK.dtype, x_MK.device)
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    kernel.launch((min(_num_blocks(x_MK.device), -(-N // FEW_OUTPUTS)), 1), addresses, pdl=pdl)


def _add_update(arguments: _Arguments, update: LowRankUpdate, *, is_gated: bool) -> None:
    update.check(arguments.M, arguments.N, is_gated=is_gated)
    stack = update.stack
    _, L, R = stack.b_NLR.shape
    assert outputs_fit(stack, FEW_OUTPUTS)
    assert 512 % R == 0
    assert L * R <= MAX_COLUMNS
    arguments.b, arguments.low = stack.b_NLR.data_ptr(), update.low_MPR.data_ptr()
    arguments.places, arguments.reads_early = update.places_M.data_ptr(), update.reads_early
    arguments.LR, arguments.R, arguments.P = L * R, R, stack.num_parts
    arguments.first, arguments.second = update.part_starts
