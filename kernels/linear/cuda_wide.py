"""Gated products of 193 to 1,024 rows on Hopper: `wide.cu`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import Kernel, can_run_hopper_kernels, tensor_map

# M rows of x, N rows of the weight, K inputs, I = N / 2 outputs

_SOURCE: Final = Path(__file__).with_name("wide.cu")
_BM, _BK = 128, 64
_CHUNK_BYTES: Final = 64 * 64 * 2
_SHARED_BYTES: Final = 227 * 1024
_OTHER_BYTES: Final = 1280  # of shared memory: barriers and alignment


@dataclass(frozen=True, slots=True)
class WideTiling:
    """How a product is cut: blocks of a cluster compute a tile each and share what they read.

    Args:
        block_n: rows of the weight in a tile, a multiple of 16 `cluster_m`, at most 256.
        cluster_m: blocks, 1 to 3, for tiles of 128 rows below each other.
    """

    block_n: int
    cluster_m: int

    def num_tiles(self, num_rows: int, num_weight_rows: int) -> int:
        """The number of tiles, each of which one cluster computes."""
        return -(-num_rows // (self.cluster_m * _BM)) * -(-num_weight_rows // self.block_n)

    @property
    def stage_bytes(self) -> int:
        return (_BM + self.block_n) * _BK * 2

    @property
    def result_bytes(self) -> int:
        return 2 * -(-self.block_n // 128) * _CHUNK_BYTES

    @property
    def num_stages(self) -> int:
        """The number of stages that fit into shared memory beside the results."""
        return min(8, (_SHARED_BYTES - _OTHER_BYTES - self.result_bytes) // self.stage_bytes)


_TILINGS: Final = (
    (193, 256, WideTiling(224, 2)),
    (369, 384, WideTiling(224, 1)),
    (433, 512, WideTiling(224, 2)),
    (625, 640, WideTiling(224, 1)),
    (753, 768, WideTiling(224, 2)),
    (1009, 1024, WideTiling(224, 2)),
)
"""First and last number of rows. Between them, cuBLAS and a kernel for the activation are as fast or faster: a tile of
128 rows of which few are there takes longer than a whole one."""


def choose_wide_tiling(num_rows: int) -> WideTiling | None:
    """None: cuBLAS and a kernel for the activation are not slower (benchmarks/gpu_kernels.md)."""
    return next((tiling for first, last, tiling in _TILINGS if first <= num_rows <= last), None)


class _Arguments(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), *((name, ctypes.c_int) for name in ("M", "N", "K"))]


@cache
def _kernel(tiling: WideTiling, dtype: torch.dtype, device: torch.device) -> Kernel:
    num_sums = tiling.block_n // 2
    shared_bytes = tiling.num_stages * tiling.stage_bytes + tiling.result_bytes + _OTHER_BYTES
    constants: dict[str, int | str] = {
        "BN": tiling.block_n, "CM": tiling.cluster_m, "STAGES": tiling.num_stages,
        "SUM_REGISTERS": '"{}"'.format(", ".join(f"%{i}" for i in range(num_sums))),
        "SUM_OPERANDS": ", ".join(f'"+f"(d[{i}])' for i in range(num_sums)),
        **{name: f'"%{num_sums + i}"' for i, name in enumerate(("X_OPERAND", "W_OPERAND", "ADDS_OPERAND"))},
    }  # fmt: skip
    with torch.cuda.device(device):
        return Kernel.load(_SOURCE, "wide", dtype, threads=384, shared_bytes=shared_bytes, **constants)


@cache
def _max_clusters(tiling: WideTiling, dtype: torch.dtype, device: torch.device) -> int:
    """How many the device computes at once."""
    with torch.cuda.device(device):
        if tiling.cluster_m == 1:
            return torch.cuda.get_device_properties(device).multi_processor_count
        return _kernel(tiling, dtype, device).max_clusters(tiling.cluster_m)


def fits(x_MK: Tensor, weight_NK: Tensor) -> bool:
    """Whether the kernel is for this device, type and shape."""
    N, K = weight_NK.shape
    is_16_bit = x_MK.dtype == weight_NK.dtype and x_MK.dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and N % 16 == 0 and K % 8 == 0 and can_run_hopper_kernels(x_MK.device)


def wide_gated_linear(
    x_MK: Tensor, weight_NK: Tensor, out_MI: Tensor, tiling: WideTiling, *, pdl: bool = False
) -> None:
    """out = silu(x gateᵀ) * (x upᵀ), bfloat16 or float16 with float32 sums; the weight's rows alternate gate and up.

    28,672 x 4,096, µs (cuBLAS and the activation), H100, 2026-11-27: 256 rows 95 (110), 384 127 (142), 448 159 (305),
    512 161 (172), 640 202 (227), 768 238 (278), 1,024 318 (344).

    Args:
        x_MK: contiguous, as all others; K a multiple of 8, N of 16.
        pdl: launch while the kernel before still runs. That kernel must not write the weight.

    Equal bits for a row whatever the other rows and the tiling are.
    """
    M, K = x_MK.shape
    N = weight_NK.shape[0]
    assert fits(x_MK, weight_NK)
    assert x_MK.is_contiguous()
    assert weight_NK.is_contiguous()
    assert weight_NK.shape[1] == K
    assert out_MI.is_contiguous()
    assert out_MI.shape == (M, N // 2)
    assert tiling.block_n % (16 * tiling.cluster_m) == 0, "the kernel would wait for rows that no box has"
    if not M:
        return
    box = (_BK, 8, 2, tiling.block_n // tiling.cluster_m // 16)
    w_map = tensor_map(weight_NK, (K, 8, 2, N // 16), (2 * K, K, 16 * K), box)
    x_map = tensor_map(x_MK, (K, M), (K,), (_BK, _BM))
    arguments = _Arguments(out_MI.data_ptr(), M, N, K)
    addresses = (ctypes.c_void_p * 3)(x_map, w_map, ctypes.addressof(arguments))
    num_clusters = min(tiling.num_tiles(M, N), _max_clusters(tiling, x_MK.dtype, x_MK.device))
    kernel = _kernel(tiling, x_MK.dtype, x_MK.device)
    kernel.launch((tiling.cluster_m * num_clusters,), addresses, pdl=pdl)
