"""Products with `PackedCodes` on Hopper: of 1 to 16 rows at a time by `grouped_few.cu`, see there; and the weight
dequantized, for those of many rows."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, can_run_hopper_kernels, pointer
from tensorweave.kernels.linear.cuda_few import Residual
from tensorweave.kernels.packed_codes import TILE, CodeForm, PackedCodes

# M rows of x, N outputs, K inputs, Q sums of squares per row of x

MAX_GROUPED_ROWS: Final = 16
_SOURCE: Final = Path(__file__).with_name("grouped_few.cu")
_PLAIN, _GATED, _RESIDUAL = 0, 1, 2
_THREADS, _WARPS, _BLOCKS = 288, 8, 2
_SHARED_BYTES: Final = 113 * 1024
"""Of a block, of which two fit on a multiprocessor."""
_MAX_STAGES: Final = 12
_WIDE_TILES: Final = 6 * 132
"""From so many pairs of tiles on, two at a time share what they read of x."""
_NUMBERS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MAGIC: Final = {torch.bfloat16: 128, torch.float16: 1024}
"""What unpacking 4-bit integers adds to them."""
MOST_ROWS: Final = 128
"""Of products some rows at a time; beyond, dequantizing first reads and writes no more."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "x", "squares", "bias", "out", "residual", "gained", "gain")),
        ("squares_out", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("num_squares", ctypes.c_int),
        ("M", ctypes.c_int), ("N", ctypes.c_int), ("K", ctypes.c_int), ("blocks", ctypes.c_int),
        ("zero", ctypes.c_uint32),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Variant:
    """What a kernel is compiled for."""

    form: CodeForm
    epilogue: int
    is_scaled: bool
    has_bias: bool
    is_wide: bool
    row_groups: int
    tiles: int
    dtype: torch.dtype

    @property
    def stage_bytes(self) -> int:
        return self.tiles * _WARPS * self.form.record_bytes

    @property
    def other_bytes(self) -> int:
        """Sums, factors, alignment, and at most so many barriers."""
        sums = 2 * _WARPS * 16 * self.tiles * (self.row_groups * 8 + 1) + self.row_groups * 8
        return 4 * sums + 128 + 16 * _MAX_STAGES

    @property
    def stages(self) -> int:
        return min(_MAX_STAGES, (_SHARED_BYTES - self.other_bytes) // self.stage_bytes)

    def constants(self) -> dict[str, int | str]:
        return {
            **form_constants(self.form), "EPILOGUE": self.epilogue, "SCALED": self.is_scaled, "BIAS": self.has_bias,
            "WIDE_OUT": self.is_wide, "NT": self.row_groups, "RT": self.tiles, "STAGES": self.stages,
        }  # fmt: skip


def form_constants(form: CodeForm) -> dict[str, int | str]:
    return {
        "BITS": form.bits, "FLOATS": form.is_float, "GROUP": form.group, "NUMBERS": _NUMBERS[form.numbers],
        "OFFSETS": form.has_offsets,
    }  # fmt: skip


@cache
def _kernel(variant: _Variant, device: torch.device) -> Kernel:
    shared_bytes = variant.stages * variant.stage_bytes + variant.other_bytes
    with torch.cuda.device(device):
        return Kernel.load(
            _SOURCE, "grouped_few", variant.dtype, threads=_THREADS, shared_bytes=shared_bytes, **variant.constants()
        )


@cache
def _dequantizer(form: CodeForm, dtype: torch.dtype, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        return Kernel.load(
            _SOURCE, "dequantize", dtype, threads=256, shared_bytes=0, DEQUANTIZE=1, **form_constants(form)
        )


@cache
def _num_blocks(device: torch.device) -> int:
    return _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count


def fits(weight: PackedCodes) -> bool:
    """Whether the kernels are for this device, type and shape."""
    is_16_bit = weight.dtype in _MAGIC
    return is_16_bit and weight.num_inputs % 8 == 0 and can_run_hopper_kernels(weight.records.device)


def grouped_few_linear(
    x_MK: Tensor,
    weight: PackedCodes,
    out_MN: Tensor | None,
    *,
    is_gated: bool = False,
    bias_N: Tensor | None = None,
    squares_MQ: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Residual | None = None,
    pdl: bool = False,
) -> None:
    """See `thin_linear`, for 1 to 16 rows. `residual` has the fields of a `ResidualSum`, with a sum of squares for each
    16 outputs, and then there is no `out_MN`, which else has the type of x or is float32."""
    M, K = x_MK.shape
    N = weight.num_outputs
    assert fits(weight)
    assert 1 <= M <= MAX_GROUPED_ROWS
    assert weight.num_inputs == K
    assert x_MK.is_contiguous()
    assert x_MK.dtype == weight.dtype
    arguments = _Arguments(
        weight.records.data_ptr(), x_MK.data_ptr(), pointer(squares_MQ), pointer(bias_N), pointer(out_MN),
        epsilon=epsilon, num_squares=0 if squares_MQ is None else squares_MQ.shape[1], M=M, N=N, K=K,
        blocks=weight.records.shape[1], zero=_twice(weight),
    )  # fmt: skip
    if residual is not None:
        residual_MN, gain_N, gained_MN, squares_out = residual
        assert squares_out.shape == (M, -(-N // TILE))
        arguments.residual, arguments.gain = residual_MN.data_ptr(), gain_N.data_ptr()
        arguments.gained, arguments.squares_out = gained_MN.data_ptr(), squares_out.data_ptr()
    num_tiles = -(-N // TILE)
    variant = _Variant(
        weight.form,
        _RESIDUAL if residual is not None else _GATED if is_gated else _PLAIN,
        squares_MQ is not None,
        bias_N is not None,
        out_MN is not None and out_MN.dtype == torch.float32,
        1 if M <= 8 else 2,
        2 if weight.form.bits == 4 and num_tiles >= 2 * _WIDE_TILES else 1,
        weight.dtype,
    )
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    grid = min(_num_blocks(x_MK.device), -(-num_tiles // variant.tiles))
    _kernel(variant, x_MK.device).launch((grid, 1), addresses, pdl=pdl)


def grouped_linear(
    x_MK: Tensor,
    weight: PackedCodes,
    out_MN: Tensor,
    *,
    is_gated: bool = False,
    bias_N: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """The same for any number of rows, some at a time."""
    for rows, part in zip(torch.split(x_MK, MAX_GROUPED_ROWS), torch.split(out_MN, MAX_GROUPED_ROWS), strict=True):
        grouped_few_linear(rows, weight, part, is_gated=is_gated, bias_N=bias_N, pdl=pdl)


def dequantize(weight: PackedCodes) -> Tensor:
    """[N, K] in the type of its rows, a new tensor."""
    assert fits(weight)
    N, K = weight.num_outputs, weight.num_inputs
    tiles, blocks, _ = weight.records.shape
    out_NK = torch.empty(N, K, dtype=weight.dtype, device=weight.records.device)
    arguments = (
        ctypes.c_void_p(weight.records.data_ptr()), ctypes.c_void_p(out_NK.data_ptr()), ctypes.c_int(N),
        ctypes.c_int(K), ctypes.c_int(blocks), ctypes.c_uint32(_twice(weight)),
    )  # fmt: skip
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    kernel = _dequantizer(weight.form, weight.dtype, out_NK.device)
    kernel.launch((-(-tiles * blocks // 8), 1), addresses)
    return out_NK


def _twice(weight: PackedCodes) -> int:
    """What is subtracted from unpacked 4-bit integers: bits of the type, twice."""
    zero = torch.tensor(_MAGIC[weight.dtype] + weight.zero, dtype=weight.dtype)
    bits = int(zero.view(torch.int16).item())
    return bits << 16 | bits
