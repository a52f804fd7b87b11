"""What a link between two GPUs should carry, by what it is made of; the start-up self-test compares."""

from __future__ import annotations

import ctypes
from typing import Final

import torch

DIRECT: Final = "ipc_direct"
"""The transport of which rates are expected."""
_NVLINK_BYTES_PER_S: Final = 25e9
"""Of one link in one direction, of the third generation and the fourth (A100 to H200)."""
_PCIE_BYTES_PER_S: Final = 12e9
"""What PCIe 4.0 with 16 lanes carries beside what else it has to do; faster ones carry more."""
_LEAST_SHARE: Final = 0.5
_MOST_LINKS: Final = 18


def shortfall(
    bytes_per_s: float, transport: str, sender_is_here: bool, device: torch.device, num_links: int
) -> str | None:
    """Why a link of this rate is far below what it should give; None if it is not, or if nothing is known of it.

    Args:
        sender_is_here: whether the sending rank is on this host.
        num_links: NVLinks of this rank's GPU that are up.
    """
    if device.type != "cuda":
        return None
    if transport == "ipc":  # which goes through a buffer: what it should give is not known
        return None
    if transport != DIRECT:
        if sender_is_here:
            return f"both GPUs are in this host, but KV takes {transport}: one cannot read the other's memory"
        return None
    expected = num_links * _NVLINK_BYTES_PER_S or _PCIE_BYTES_PER_S
    if bytes_per_s >= _LEAST_SHARE * expected:
        return None
    way = f"{num_links} NVLinks" if num_links else "PCIe, since no NVLink is up"
    return f"{bytes_per_s / 1e9:.0f} GB/s over {way}, which should carry {expected / 1e9:.0f}"


def count_nvlinks(device: torch.device) -> int:
    """NVLinks of this GPU that are up; 0 where the driver's library does not tell."""
    if device.type != "cuda":
        return 0
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if library.nvmlInit_v2():
        return 0
    try:
        handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return 0
        return sum(_is_up(library, handle, number) for number in range(_MOST_LINKS))
    finally:
        library.nvmlShutdown()


def _is_up(library: ctypes.CDLL, handle: ctypes.c_void_p, number: int) -> bool:
    state = ctypes.c_uint()
    return not library.nvmlDeviceGetNvLinkState(handle, number, ctypes.byref(state)) and state.value == 1
