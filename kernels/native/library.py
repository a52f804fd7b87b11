"""The C kernels of `kernels/c`: compiled once for this machine with gcc, cached, loaded with ctypes.

`load_native` returns None where there is no compiler, or where TENSORWEAVE_NATIVE=0 is set; `choose_operations` then
takes the references. The kernels have threads of their own (pool.h), as many as `use_threads` says; torch should then
use one, since the threads of two pools would spin against each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tensorweave.kernels.native.structures import check_sizes

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).resolve().parent.parent / "c"
_COMPILER = "gcc"
# Contraction into fused multiply-adds is allowed, reordering is not: sums keep the order that the source gives them.
_FLAGS = ("-std=gnu11", "-O2", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread")
_COMPILE_TIMEOUT_S = 300.0

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack_weight": (*[_POINTER] * 2, *[_LONG] * 2),
    "linear": (_POINTER, _LONG, *[_POINTER] * 5, *[_LONG] * 3),
    "add_rms_norm": (*[_POINTER] * 4, *[_LONG] * 2, *[_FLOAT] * 2),
    "square_sums": (_POINTER, _LONG, _POINTER, *[_LONG] * 2),
    "scale_by_rms": (_POINTER, _LONG, *[_POINTER] * 2, *[_LONG] * 3, _FLOAT),
    "silu_mul": (*[_POINTER] * 2, *[_LONG] * 2),
    "gelu_mul": (*[_POINTER] * 2, *[_LONG] * 2),
    "place_heads": (*[_POINTER] * 6, *[_FLOAT] * 2, *[_LONG] * 8),
    "attend": (_POINTER, _LONG, *[_POINTER] * 5, *[_LONG] * 5, *[_FLOAT] * 2, _POINTER, _LONG),
    "run_layers": (*[_POINTER] * 2,),
    "add_updates": (_POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG),
    "grouped_linear": (_POINTER, _POINTER, _LONG, *[_POINTER] * 3, _LONG),
    "choose_scales": (_POINTER, *[_LONG] * 4, _POINTER),
    "round_weights": (*[_POINTER] * 2, *[_LONG] * 4, _POINTER),
    "mixture": (*[_POINTER] * 5, _LONG),
    "add_gated": (*[_POINTER] * 3, *[_LONG] * 2),
}
_INT64 = ctypes.c_int64
# These do not depend on the type of rows.
_COMMON_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "layers_scratch": (_INT64, (_POINTER, _INT64, _INT64)),
    "grouped_bytes": (_INT64, (_POINTER,)),
    "grouped_scratch": (_INT64, (_POINTER, _INT64)),
    "mixture_scratch": (_INT64, (_POINTER, _INT64, _INT64)),
    "pack_grouped": (None, (*[_POINTER] * 5,)),
    "reads_half_scales": (ctypes.c_int, ()),
}
# These work on bytes, whatever the element type.
_BYTE_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "digest_blocks": (*[_POINTER] * 3, *[_LONG] * 7, _POINTER, _LONG, _POINTER),
    "move_blocks": (*[_POINTER] * 2, *[_LONG] * 6, _POINTER, ctypes.c_int),
    "unpack_verified_blocks": (*[_POINTER] * 3, *[_LONG] * 7, *[_POINTER] * 2, _LONG, *[_POINTER] * 2),
}
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The kernels for one element type. A pointer is a `data_ptr()` of a contiguous tensor, or None for null; where a
    kernel takes structures, `ctypes.byref` of one.

    `run_layers` multiplies `most_rows_at_once` rows after another; `update_width` are the outputs of a panel of
    `add_updates`.

    `linear_by_bf16` and `mixture_by_bf16` take float32 rows and weights packed as bfloat16; they, `argmax`, `sample`
    and `mask_tokens` are None for other types.
    """

    dtype: torch.dtype
    vector_length: int
    pack_weight: Any
    linear: Any
    add_rms_norm: Any
    square_sums: Any
    scale_by_rms: Any
    silu_mul: Any
    gelu_mul: Any
    place_heads: Any
    attend: Any
    run_layers: Any
    layers_scratch: Any
    grouped_linear: Any
    grouped_bytes: Any
    grouped_scratch: Any
    pack_grouped: Any
    reads_half_scales: Any
    choose_scales: Any
    round_weights: Any
    most_rows_at_once: int
    add_updates: Any
    update_width: int
    mixture: Any
    add_gated: Any
    mixture_scratch: Any
    linear_by_bf16: Any | None
    mixture_by_bf16: Any | None
    argmax: Any | None
    sample: Any | None
    mask_tokens: Any | None


@functools.cache
def load_native(dtype: torch.dtype) -> NativeKernels | None:
    """Compiles on the first call on a machine (seconds). None: not this type, no compiler, or switched off."""
    library = _library() if dtype in _SUFFIXES else None
    if library is None:
        return None
    kernels = {name: _function(library, name, _SUFFIXES[dtype]) for name in _SIGNATURES}
    for name, (result, arguments) in _COMMON_SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
        kernels[name] = function
    kernels |= {"most_rows_at_once": library.most_rows_at_once(), "update_width": library.update_width()}
    kernels |= dict.fromkeys(("linear_by_bf16", "mixture_by_bf16", "argmax", "sample", "mask_tokens"))
    if dtype == torch.float32:
        argmax = library.argmax_f32
        argmax.argtypes, argmax.restype = (*[_POINTER] * 2, *[_LONG] * 2), None
        sample = library.sample_f32
        sample.argtypes, sample.restype = (*[_POINTER] * 8, *[_LONG] * 2), None
        mask = library.mask_tokens_f32
        mask.argtypes, mask.restype = (*[_POINTER] * 3, *[_LONG] * 2), None
        kernels |= {"argmax": argmax, "sample": sample, "mask_tokens": mask}
        kernels["linear_by_bf16"] = _function(library, "linear", "f32_by_bf16")
        kernels["mixture_by_bf16"] = _function(library, "mixture", "f32_by_bf16")
    return NativeKernels(dtype, library.vector_length(), **kernels)


def byte_kernel(name: Literal["digest_blocks", "move_blocks", "unpack_verified_blocks"]) -> Any | None:
    """A kernel of `c/digest.h`, or None where there are none. It runs without the interpreter's lock."""
    library = _library()
    if library is None:
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = _BYTE_SIGNATURES[name], None
    return function


def as_longs(values: Sequence[int]) -> Any:
    """An array for a pointer argument."""
    return (_LONG * len(values))(*values)


def _function(library: ctypes.CDLL, name: str, suffix: str) -> Any:
    function = getattr(library, f"{name}_{suffix}")
    function.argtypes, function.restype = _SIGNATURES[name], None
    return function


def use_threads(num_threads: int) -> bool:
    """Run the kernels on this many threads from now on, in the whole process. Return False where there are no kernels.

    Threads are only ever added: a smaller number than before changes nothing.
    """
    library = _library()
    return library is not None and library.use_threads(num_threads) >= num_threads


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("TENSORWEAVE_NATIVE", "1") == "0":
        return None
    folder = _cache_folder()
    try:
        library = ctypes.CDLL(str(_compiled(folder)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        logger.warning("no native CPU kernels in %s, using torch's instead: %s", folder, detail[:500])
        return None
    check_sizes(library)
    return library


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tensorweave" / "kernels"


def _compiled(folder: Path) -> Path:
    """Path of the library for these sources, flags, compiler and CPU. Concurrent callers may both compile it."""
    library = folder / f"{_digest()}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "kernels.so"
        _run(_COMPILER, *_FLAGS, "-shared", str(_SOURCES / "kernels.c"), "-o", str(built), "-lm")
        built.replace(library)
    return library


def _digest() -> str:
    native_flags = _run(_COMPILER, "-march=native", "-Q", "--help=target")
    parts = [_run(_COMPILER, "--version"), native_flags, *_FLAGS]
    parts += [file.read_text(encoding="utf-8") for file in sorted(_SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    return done.stdout
