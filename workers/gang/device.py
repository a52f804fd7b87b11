"""Chooses the device of a rank and the type in which it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

_FIRST_WITH_FP8: Final = (8, 9)


def pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def pick_dtype(wanted: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """'auto' is the checkpoint's type; on a CPU float32, unless that is bfloat16 and the CPU multiplies it fast."""
    if wanted == "auto":
        is_slow = device.type == "cpu" and not (checkpoint_dtype == "bfloat16" and has_fast_bfloat16())
        wanted = "float32" if is_slow else checkpoint_dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def check_fp8(device: torch.device) -> None:
    """Raises ValueError if the device is a GPU that has no 8-bit floats."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else _FIRST_WITH_FP8
    if capability < _FIRST_WITH_FP8:
        raise ValueError(
            "FP8 weights (quant_config) and an FP8 KV cache need a GPU of compute capability 8.9 or more; this one has "
            f"{capability[0]}.{capability[1]}"
        )


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has bfloat16 dot products or tiles; False if the system does not say."""
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
