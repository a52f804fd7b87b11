"""Measures the link between the ranks of a tensor-parallel group with the collectives that a step uses, before the
first step.

Every rank calls `measure_link`. It takes milliseconds on a good link and less than two seconds at 1 Mbit/s.
"""

from __future__ import annotations

import statistics
import time
from typing import Final

import torch

from tensorweave.cluster.ranks import LinkRate
from tensorweave.workers.gang.comm import Comm

_NUM_SMALL: Final = 9
_SMALL_BYTES: Final = 8
_PROBE_BYTES: Final = 64 << 10
_LARGE_BYTES: Final = 2 << 20
_NUM_LARGE: Final = 3
_QUICK_S: Final = 0.02
"""If the probe takes longer, it is the measurement: 32 times as many bytes would take too long."""


def measure_link(comm: Comm, device: torch.device) -> LinkRate:
    """The latency is the median of a few small all-reduces, the rate the best of a few large ones. A ring of n ranks
    moves 2 (n - 1) / n of the bytes over each link."""
    _all_reduce_s(comm, device, _PROBE_BYTES)  # the first one makes the connections
    latency_s = statistics.median(_all_reduce_s(comm, device, _SMALL_BYTES) for _ in range(_NUM_SMALL))
    num_bytes, least_s = _PROBE_BYTES, _all_reduce_s(comm, device, _PROBE_BYTES)
    if comm.agree_min(-round(least_s * 1e6)) > -_QUICK_S * 1e6:  # no rank took longer
        num_bytes, least_s = _LARGE_BYTES, min(_all_reduce_s(comm, device, _LARGE_BYTES) for _ in range(_NUM_LARGE))
    num_ranks = comm.place.mesh.tensor
    return LinkRate(latency_s, 2 * (num_ranks - 1) / num_ranks * num_bytes / least_s)


def _all_reduce_s(comm: Comm, device: torch.device, num_bytes: int) -> float:
    tensor = torch.zeros(num_bytes // torch.float32.itemsize, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    comm.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
