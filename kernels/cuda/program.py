"""CUDA C++ kernels for Hopper: compiled by NVRTC when they are first needed (0.7 s each, then kept on disk), launched
through the driver.

NVRTC and its Python bindings come with torch's CUDA wheels, so that users need no toolkit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.kernel_cache import cached_binary, ensure_kernel_cache

_SHARED = Path(__file__).with_name("hopper.cuh")
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT (percent)
_MAX_SHARED_BYTES, _SHARED_SHARE = 8, 9
# CU_TENSOR_MAP_DATA_TYPE_..., of PTX
_ELEMENTS = {torch.float16: (6, "f16"), torch.float32: (7, "f32"), torch.bfloat16: (9, "bf16")}
_SWIZZLE_128_BYTES, _PROMOTE_256_BYTES = 3, 3


@cache
def can_run_hopper_kernels(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU and NVRTC's bindings are installed."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and find_spec("cuda") is not None
        and find_spec("cuda.bindings") is not None
    )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, doing: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"{doing}: {(name.value or b'unknown error').decode()} ({code})")


def compile_cubin(source: Path, options: Sequence[str]) -> bytes:
    """Raises RuntimeError with the compiler's log."""
    from cuda.bindings import nvrtc

    text = _SHARED.read_bytes() + source.read_bytes()
    options = ["--gpu-architecture=sm_90a", "-std=c++17", *options]
    compiler = f"{nvrtc.nvrtcVersion()} {options}"
    return cached_binary(ensure_kernel_cache(), text, compiler, lambda: _compile(text, source.name, options))


def _compile(text: bytes, name: str, options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], [])
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile: {log.decode(errors='replace')}")
    cubin: bytes = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int * 3),
        ("rest", ctypes.c_int * 13),
    ]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip


_PDL: Final = _LaunchAttribute(6, 0, (1, 0, 0))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_CLUSTER_DIMENSION: Final = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled function of this process's current device."""

    function: ctypes.c_void_p
    threads: int
    shared_bytes: int

    @classmethod
    def load(
        cls,
        source: Path,
        name: str,
        dtype: torch.dtype,
        *,
        threads: int,
        shared_bytes: int,
        **constants: int | str,
    ) -> Kernel:
        """`constants` are defined for the preprocessor, and TYPE as PTX calls the dtype."""
        defined = {key: value if isinstance(value, str) else int(value) for key, value in constants.items()}
        options = [f'-DTYPE="{_ELEMENTS[dtype][1]}"', *(f"-D{key}={value}" for key, value in defined.items())]
        cubin = compile_cubin(source, options)
        torch.cuda.current_stream()  # the context exists
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"load {source.name}")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"find {name}")
        _check(_driver().cuFuncSetAttribute(function, _MAX_SHARED_BYTES, shared_bytes), f"shared memory of {name}")
        _check(_driver().cuFuncSetAttribute(function, _SHARED_SHARE, 100), f"share of shared memory of {name}")
        return cls(function, threads, shared_bytes)

    def max_clusters(self, cluster: int) -> int:
        """How many clusters of so many blocks run at once on the current device."""
        attribute = _LaunchAttribute(_CLUSTER_DIMENSION, 0, (cluster, 1, 1))
        config = _LaunchConfig(
            cluster, 1, 1, self.threads, 1, 1, self.shared_bytes, None, ctypes.pointer(attribute), 1
        )  # fmt: skip
        count = ctypes.c_int()
        code = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self.function, ctypes.byref(config))
        _check(code, f"clusters of {cluster}")
        return count.value

    def launch(self, grid: tuple[int, ...], arguments: ctypes.Array[ctypes.c_void_p], *, pdl: bool = False) -> None:
        """On torch's current stream. `arguments` are addresses of the parameters, which are copied.

        `pdl`: while the kernel before still runs; this one waits for it where it must.
        """
        config = _LaunchConfig(
            *(*grid, 1, 1)[:3], self.threads, 1, 1, self.shared_bytes, torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(_PDL), int(pdl),
        )  # fmt: skip
        code = _driver().cuLaunchKernelEx(ctypes.byref(config), self.function, arguments, None)
        if code:
            _check(code, "launch")


def pointer(tensor: Tensor | None) -> int | None:
    """A kernel's argument; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


class _MapMemory:
    """Where the driver writes a tensor map, at 64 bytes."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_char * 192)()
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64


@lru_cache(maxsize=8192)
def _tensor_map(
    pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> _MapMemory:
    rank, size = len(shape), dtype.itemsize
    assert box[0] * size == 128
    assert pointer % 16 == 0
    assert all(stride * size % 16 == 0 for stride in strides)
    memory = _MapMemory()
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(memory.address), _ELEMENTS[dtype][0], rank, ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*shape), (ctypes.c_uint64 * max(rank - 1, 1))(*(s * size for s in strides)),
        (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        0, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, 0,
    )  # fmt: skip
    _check(code, f"tensor map of {shape} by {box}")
    return memory


def tensor_map(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> int:
    """Describe boxes of a tensor to the copy engine: rows of 128 bytes, swizzled; zeros beyond the tensor. Return the
    description's address.

    `shape` and `box` begin with the innermost dimension, which is contiguous; `strides` count elements of the others.
    """
    return _tensor_map(tensor.data_ptr(), tensor.dtype, shape, strides, box).address
