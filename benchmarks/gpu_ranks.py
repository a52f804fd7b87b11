"""What it takes to sum rows over GPUs, add the residual and compute the norm, in a CUDA graph: µs, the slowest rank's.

    PYTHONPATH=. python benchmarks/gpu_ranks.py [--ranks 2] [--width 4096]

Each form of `kernels/ranks/ranks.cu` for the numbers of rows that it may be used for, and NCCL's all-reduce with the
norm as a kernel of its own. Ranks are processes, each of which sees one GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.distributed as dist

from tensorweave.kernels.norm.triton import add_rms_norm
from tensorweave.kernels.ranks.cuda_ranks import CudaSums, RowLimits
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.peers import open_peer_memory
from tests.workers.rank_processes import RankProcesses

DTYPE: Final = torch.bfloat16
EPSILON: Final = 1e-5
MOST: Final = RowLimits(256, 1024)
MOST_ROWS: Final = 8192
FORMS: Final = {
    "pushed": (MOST, (1, 8, 16, 32, 64, 128)),
    "flagged": (RowLimits(0, MOST.flagged), (8, 32, 64, 128, 256, 512)),
    "shared": (RowLimits(0, 0), (128, 256, 512, 1024, 2048, 8192)),
}
REPEATS: Final = 7


def measure(comm: Comm, width: int) -> dict[tuple[str, int], float]:
    """µs by form and number of rows."""
    device = torch.device("cuda", 0)
    num_bytes = CudaSums.bytes_needed(width, DTYPE, comm.size, MOST, 3 * MOST_ROWS)
    memory = open_peer_memory(comm, num_bytes, device, 10.0)
    assert memory is not None, "these GPUs share no memory"
    sums, gain = CudaSums(memory, width, DTYPE, MOST), torch.ones(width, dtype=DTYPE, device=device)
    part, x, out = (sums.empty(MOST_ROWS) for _ in range(3))
    part.normal_(0, 1e-3)
    x.normal_()
    found = {}
    for form, (limits, sizes) in FORMS.items():
        sums.limits = limits
        for rows in sizes:
            call = partial(sums.add_norm, part[:rows], x[:rows], gain, EPSILON, out[:rows], is_whole=False)
            found[form, rows] = time_us(comm, call, 4 if rows > MOST.flagged else 32)
    for rows in (1, 64, 256, 1024, 8192):

        def sum_by_nccl(rows: int = rows) -> None:
            dist.all_reduce(part[:rows])
            add_rms_norm(x[:rows], part[:rows], gain, EPSILON, out[:rows])

        part.zero_()
        found["NCCL", rows] = time_us(comm, sum_by_nccl, 4 if rows > MOST.flagged else 16)
    assert memory.silent_rank() is None
    return found


def time_us(comm: Comm, call: Callable[[], object], calls_per_graph: int) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls_per_graph):
            call()
    times = []
    for _ in range(REPEATS):
        comm.agree_min(0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 10 / calls_per_graph * 1000)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    arguments = parser.parse_args()
    with RankProcesses(arguments.ranks, on_gpus=True) as ranks:
        of_ranks = ranks.call(measure, arguments.width)
    print("| form | rows | µs |\n|---|---|---|")
    for form, rows in of_ranks[0]:
        print(f"| {form} | {rows} | {max(found[form, rows] for found in of_ranks):.1f} |")


if __name__ == "__main__":
    main()
