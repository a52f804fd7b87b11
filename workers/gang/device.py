"""Chooses the device of a rank and the type in which it computes."""

from __future__ import annotations

from pathlib import Path

import torch


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


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has bfloat16 dot products or tiles; False if the system does not say."""
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
