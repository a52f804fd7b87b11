"""The rates of the device at hand: how fast it reads memory and multiplies matrices. `suite_roofline.py` divides by
them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from tensorweave.cli.suite_roofline import Rates

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUM_RUNS: Final = 15
_WIDTH: Final = 4096
_GPU_HEIGHT, _CPU_HEIGHT = 1 << 19, 1 << 14  # 4.3 GB and 134 MB in 16 bits: far more than a cache
_GPU_PRODUCT, _CPU_PRODUCT = 8192, 1024


def measure_rates(device: str, dtype: str, layer_dtype: str) -> Rates:
    """Measure in `dtype`, the layers' products in `layer_dtype`, which may be "fp8". Takes about a second, and on a GPU
    5 GB of its memory, which are free again afterwards."""
    where = torch.device(device)
    operations = _product_rate(where, _DTYPES[dtype])
    layer_operations = _fp8_product_rate(where) if layer_dtype == "fp8" else operations
    rates = Rates(_read_rate(where, _DTYPES[dtype]), operations, layer_operations)
    if where.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The faster of a sum and a product with one vector over a large matrix."""
    height = _GPU_HEIGHT if device.type == "cuda" else _CPU_HEIGHT
    weight, x = (torch.randn(rows, _WIDTH, device=device, dtype=dtype) for rows in (height, 1))
    seconds = [_median_s(device, lambda: weight.view(torch.int64).sum())]
    if device.type == "cuda" and dtype != torch.float32:
        from tensorweave.kernels.linear.triton_thin import thin_linear

        out = torch.empty(1, height, device=device, dtype=dtype)
        seconds.append(_median_s(device, lambda: thin_linear(x, weight, out)))
    else:
        seconds.append(_median_s(device, lambda: weight @ x[0]))
    return weight.nbytes / min(seconds)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = _GPU_PRODUCT if device.type == "cuda" else _CPU_PRODUCT
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_s(device, lambda: a @ b)


def _fp8_product_rate(device: torch.device) -> float:
    size = _GPU_PRODUCT
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(size, 1, device=device), torch.ones(1, size, device=device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / _median_s(device, product)


def _median_s(device: torch.device, run: Callable[[], object]) -> float:
    run()
    if device.type == "cuda":
        return _median_of_events_s(run)
    seconds = []
    for _ in range(_NUM_RUNS):
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def _median_of_events_s(run: Callable[[], object]) -> float:
    events = [_event_pair() for _ in range(_NUM_RUNS)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(stop)) for start, stop in events) / 1e3


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return start, stop
