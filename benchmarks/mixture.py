"""A layer's mixture of experts on a CPU: one native call, also with integer weights; one expert after the other with
native products; and torch.

    python benchmarks/mixture.py --threads 2

Milliseconds of one layer, router included: the least of the calls that fit in half a second, and their median. The
forms take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.mixture.reference import SILU, EachExpert, Expert, ExpertGroup
from tensorweave.kernels.mixture.routing import Routing
from tensorweave.kernels.native.library import use_threads
from tensorweave.kernels.operations import Operations, choose_operations, reference_operations
from tensorweave.kernels.weights import GroupedWeight, Weight

CPU: Final = torch.device("cpu")
SHAPES: Final = {"8 experts, 2 chosen": (8, 2, 1024, 2816), "64 experts, 8 chosen": (64, 8, 1024, 352)}
"""Number of experts and of those chosen, hidden size, width of an expert."""
ROWS: Final = (1, 4, 16, 64, 512)
SECONDS: Final = 0.5

Form = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    use_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            forms = make_forms(shape, dtype)
            print(f"\n{name}, {args.dtype}, {args.threads} threads\n| rows | {' | '.join(forms)} |")
            for num_rows in ROWS:
                x = torch.randn(num_rows, shape[2]).to(dtype)
                times = measure(forms, x, args.threads)
                print(f"| {num_rows} | {' | '.join(times)} |", flush=True)


def make_forms(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Form]:
    """All with the same weights, except for integers, which are random."""
    num_experts, num_chosen, hidden, width = shape
    router = (torch.randn(num_experts, hidden) / hidden**0.5).to(dtype)
    gate_up = [(torch.randn(2 * width, hidden) / hidden**0.5).to(dtype) for _ in range(num_experts)]
    down = [(torch.randn(hidden, width) / width**0.5).to(dtype) for _ in range(num_experts)]

    def group(operations: Operations, kept: Callable[[Tensor], Weight]) -> ExpertGroup:
        experts = [
            Expert(operations.make_linear(kept(one), None), operations.make_linear(kept(other), None))
            for one, other in zip(gate_up, down, strict=True)
        ]
        routing = Routing(num_chosen, is_renormalized=True, is_rounded=False)
        return ExpertGroup(tuple(experts), 0, num_experts, routing, SILU)

    native, plain = choose_operations(CPU, dtype, 64), reference_operations(CPU, dtype)
    choose, choose_plainly = native.make_linear(router, None), plain.make_linear(router, None)
    of_native = group(native, plainly)
    whole, each, reference = native.make_experts(of_native), EachExpert(of_native), EachExpert(group(plain, plainly))
    eight, four = (native.make_experts(group(native, integers)) for integers in (in_8_bits, in_4_bits))
    return {
        "one native call": lambda x: whole(x, choose(x)),
        "8 bits": lambda x: eight(x, choose(x)),
        "4 bits in groups of 32": lambda x: four(x, choose(x)),
        "one by one, native products": lambda x: each(x, choose(x)),
        "torch": lambda x: reference(x, choose_plainly(x)),
    }


def plainly(weight: Tensor) -> Weight:
    return weight


def in_8_bits(weight: Tensor) -> Weight:
    codes, scales = torch.randint(256, weight.shape, dtype=torch.uint8), torch.rand(len(weight), 1)
    return GroupedWeight.of_codes(codes, scales, group_size=weight.shape[1], bits=8, zero=128, dtype=weight.dtype)


def in_4_bits(weight: Tensor) -> Weight:
    codes, scales = torch.randint(16, weight.shape, dtype=torch.uint8), torch.rand(len(weight), weight.shape[1] // 32)
    return GroupedWeight.of_codes(codes, scales.half(), group_size=32, bits=4, zero=8, dtype=weight.dtype)


def measure(forms: dict[str, Form], x: Tensor, threads: int) -> list[str]:
    times: dict[str, list[float]] = {name: [] for name in forms}
    stop_s = time.perf_counter() + SECONDS * len(forms)
    while time.perf_counter() < stop_s or min(map(len, times.values())) < 3:
        for name, form in forms.items():
            torch.set_num_threads(threads if name == "torch" else 1)
            form(x)
            for _ in range(3):
                began_s = time.perf_counter()
                form(x)
                times[name].append(time.perf_counter() - began_s)
    return [f"{min(each) * 1e3:.2f} / {statistics.median(each) * 1e3:.2f}" for each in times.values()]


if __name__ == "__main__":
    main()
