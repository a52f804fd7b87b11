"""What the benchmarks of GPU kernels and steps share: times of launches and graphs, search among tilings, arguments."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.linear.thin_tiling import Tiling

DEVICE = torch.device("cuda")
Job = tuple[str, int]
"""A product's name and its number of rows."""


def median_ms(run: Callable[[], object], count: int = 15) -> float:
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[count // 2]


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def median_us(runs: Sequence[Callable[[], object]], repeats: int = 1) -> float:
    """Of one launch, in a graph of all runs, `repeats` times over."""

    def run_all() -> None:
        for _ in range(repeats):
            for run in runs:
                run()

    return median_ms(capture(run_all).replay) * 1e3 / len(runs) / repeats


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


class TiledProduct(Protocol):
    """A product over several weights, so that none is in the level-2 cache."""

    def us(self, tiling: Tiling) -> float: ...


def compile_tilings(job: Job, make: Callable[[str, int], TiledProduct], tilings: Sequence[Tiling]) -> None:
    """In a process of its own, so that many are compiled at once."""
    for _, problem in _try_all(job, make(*job), tilings):
        if problem:
            print(problem)


def compile_all(compile_job: Callable[[Job], None], jobs: Sequence[Job]) -> None:
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_job, jobs, chunksize=1)


def time_tilings(job: Job, product: TiledProduct, tilings: Sequence[Tiling]) -> tuple[dict[Tiling, float], list[str]]:
    """µs of each tiling that runs, in the order in which they are given, and what is wrong with the others."""
    times, problems = {}, []
    for (tiling, us), problem in _try_all(job, product, tilings):
        if problem:
            problems.append(problem)
        else:
            times[tiling] = us
    return times, problems


def _try_all(
    job: Job, product: TiledProduct, tilings: Sequence[Tiling]
) -> Iterator[tuple[tuple[Tiling, float], str | None]]:
    for tiling in dict.fromkeys(tilings):
        try:
            yield (tiling, product.us(tiling)), None
        except Exception as error:
            yield (tiling, 0.0), f"{job} {tiling}: {error!r:.200}"


def run_parts(description: str | None, parts: Mapping[str, Callable[[bool], Iterator[str]]]) -> None:
    """The command line of benchmarks of single kernels: parts to run, and --tune."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"(default: all of {', '.join(parts)})")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    chosen = options.parts or list(parts)
    if unknown := sorted(set(chosen) - set(parts)):
        parser.error(f"no parts {unknown}; there are {list(parts)}")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for part in chosen:
        for line in parts[part](options.tune):
            print(line, flush=True)
