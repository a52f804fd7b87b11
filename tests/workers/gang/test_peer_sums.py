"""Sums, norms and choices of tokens over the memories of two GPUs, against float64; a late, a dead rank."""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tensorweave.kernels.ranks.cuda_ranks import CudaChoice, CudaSums, RowLimits
from tensorweave.kernels.ranks.peer_memory import PeerMemory
from tensorweave.kernels.ranks.sums import share_of
from tensorweave.kernels.sample.reference import ReferenceSampler
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
from tensorweave.workers.gang import peers
from tensorweave.workers.gang.comm import Comm, GroupComm
from tensorweave.workers.gang.peers import open_peer_memory
from tests.workers.rank_processes import RankProcesses, needs_gpus

pytestmark = needs_gpus(2)

EPSILON = 1e-5
LIMIT_S = 3.0
LIMITS = RowLimits(pushed=16, flagged=80)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"fewer than {request.param} GPUs")
    with RankProcesses(request.param, on_gpus=True) as processes:
        yield processes


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _open_both_ways(comm: Comm) -> list[bool]:
    """Whether each way of sharing memory reaches that of all ranks."""
    device, found = torch.device("cuda", 0), []
    assert isinstance(comm, GroupComm)
    for open_memory in (peers._open_symmetric, peers._open_by_ipc):
        try:
            memory = open_memory(comm, CudaChoice.bytes_needed(comm.size, 8), device, LIMIT_S)
        except RuntimeError as error:
            print(f"{open_memory.__name__}: {error}")
            found.append(False)
            continue
        comm.agree_min(0)
        choice, target = CudaChoice(memory, 10 * comm.rank, 8), TokenTarget.create(1, device)
        logits = torch.zeros(1, 10, device=device)
        logits[0, 3] = comm.rank + 1.0
        choice.argmax(logits, target)
        found.append(target.tokens_R.tolist() == [10 * comm.size - 7])
    return found


def test_both_ways_of_sharing_memory(ranks: RankProcesses) -> None:
    assert ranks.call(_open_both_ways) == [[True, True]] * len(ranks.processes)


def open_memory(comm: Comm, num_bytes: int) -> PeerMemory:
    memory = open_peer_memory(comm, num_bytes, torch.device("cuda", 0), LIMIT_S)
    assert memory is not None
    return memory


class Sums:
    """A rank's sums, with buffers for some rows."""

    def __init__(self, comm: Comm, width: int, dtype: torch.dtype, max_rows: int) -> None:
        self.comm, self.width, self.dtype = comm, width, dtype
        self.memory = open_memory(comm, CudaSums.bytes_needed(width, dtype, comm.size, LIMITS, 3 * max_rows))
        self.sums = CudaSums(self.memory, width, dtype, LIMITS)
        self.part, self.x, self.out = (self.sums.empty(max_rows) for _ in range(3))
        self.gain = numbers(width, seed=9, dtype=dtype).cuda()

    def fill(self, num_rows: int, seed: int) -> None:
        parts = [numbers(num_rows, self.width, seed=seed + rank, dtype=self.dtype) for rank in range(self.comm.size)]
        self.before = numbers(num_rows, self.width, seed=seed + 50, dtype=self.dtype)
        self.part[:num_rows] = parts[self.comm.rank].cuda()
        self.x[:num_rows] = self.before.cuda()
        self.out[:num_rows] = float("nan")
        self.sum = torch.stack(parts).double().sum(0)

    def add_norm(self, num_rows: int, **how: bool) -> None:
        rows = (self.part[:num_rows], self.x[:num_rows], self.gain, EPSILON, self.out[:num_rows])
        self.sums.add_norm(*rows, **how)

    def errors(self, num_rows: int, *, is_first: bool = False, is_whole: bool = True) -> tuple[float, float]:
        """Of x and of out."""
        x = self.sum if is_first else self.before.double() + self.sum
        out = x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt() * self.gain.cpu().double()
        rows = slice(None)
        if not is_whole and num_rows > LIMITS.flagged:
            rows = share_of(num_rows, self.comm.rank, self.comm.size)
        got = self.x[:num_rows].cpu().double()[rows], self.out[:num_rows].cpu().double()
        return relative_error(got[0], x[rows]), relative_error(got[1], out)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item() if exact.numel() else 0.0


def _check_sums(comm: Comm, width: int, dtype: torch.dtype) -> list[Any]:
    sums = Sums(comm, width, dtype, 700)
    found = []
    for seed, num_rows in enumerate((1, 2, 8, 9, 16, 17, 64, 3, 80, 81, 263, 700, 1, 40)):
        for how in ({}, {"is_first": True}, {"is_whole": False}):
            sums.fill(num_rows, 100 * seed)
            torch.cuda.synchronize()
            sums.add_norm(num_rows, **how)
            torch.cuda.synchronize()
            bits = zlib.crc32(sums.out[:num_rows].cpu().view(torch.uint8).numpy().tobytes())
            found.append((num_rows, how, *sums.errors(num_rows, **how), bits))
    assert sums.memory.silent_rank() is None
    return found


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(4096, torch.bfloat16), (64, torch.float32), (72, torch.float16), (8192, torch.bfloat16), (2880, torch.bfloat16)],
)
def test_sums_and_norms_are_right_and_the_same_bits_on_all_ranks(
    width: int, dtype: torch.dtype, ranks: RankProcesses
) -> None:
    for of_ranks in zip(*ranks.call(_check_sums, width, dtype), strict=True):
        assert max(max(found[2:4]) for found in of_ranks) < TOLERANCE[dtype], of_ranks
        assert len({found[4] for found in of_ranks}) == 1, of_ranks


def _check_graph(comm: Comm) -> tuple[float, bool, bool]:
    """Sums of changing sizes in graphs that are replayed in changing order: x grows by the same sum each time."""
    sums, sizes = Sums(comm, 1024, torch.float32, 300), (1, 300, 16, 64)
    graphs = {}
    for size in sizes:
        sums.fill(size, size)
        sums.add_norm(size)
        torch.cuda.synchronize()
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size], capture_error_mode="thread_local"):
            for _ in range(5):
                sums.add_norm(size)
    worst, is_same = 0.0, True
    for turn in range(60):
        size = sizes[turn * 7 % 4]
        sums.fill(size, size)
        torch.cuda.synchronize()
        for _ in range(4):
            graphs[size].replay()
        torch.cuda.synchronize()
        exact = sums.before.double() + 20 * sums.sum
        worst = max(worst, relative_error(sums.x[:size].cpu().double(), exact))
        theirs = comm.gather_columns(sums.out[:size].contiguous(), [1024] * comm.size)
        is_same = is_same and all(torch.equal(theirs[:, :1024], each) for each in torch.split(theirs, 1024, dim=1))
    return worst, is_same, sums.memory.silent_rank() is None


def test_graphs_of_several_sizes_are_replayed_any_number_of_times(ranks: RankProcesses) -> None:
    for worst, is_same, is_well in ranks.call(_check_graph):
        assert worst < 1e-5
        assert is_same
        assert is_well


def _be_late(comm: Comm, delay_s: float) -> list[tuple[float, float]]:
    sums = Sums(comm, 256, torch.float32, 100)
    found = []
    for num_rows in (4, 40, 100):
        for late in range(comm.size):
            sums.fill(num_rows, num_rows + late)
            torch.cuda.synchronize()
            comm.agree_min(0)
            if comm.rank == late:
                time.sleep(delay_s)
            sums.add_norm(num_rows)
            torch.cuda.synchronize()
            found.append(sums.errors(num_rows))
    assert sums.memory.silent_rank() is None
    return found


def test_a_late_rank_is_waited_for(ranks: RankProcesses) -> None:
    for found in ranks.call(_be_late, LIMIT_S / 3):
        assert max(max(errors) for errors in found) < 1e-5


def _choose(comm: Comm) -> tuple[list[list[int]], list[int]]:
    V, share = 1000, (600, 400) if comm.size == 2 else (300, 300, 200, 200)
    first = sum(share[: comm.rank])
    memory = open_memory(comm, CudaChoice.bytes_needed(comm.size, 64))
    choice, found = CudaChoice(memory, first, 64), []
    for num_rows in (1, 7, 64):
        logits = numbers(num_rows, V, seed=num_rows)
        logits[0, 500:700] = logits.max() + 1  # the first of equal ones counts
        if num_rows > 3:
            logits[1] = -torch.inf
            logits[2, 900] = torch.nan
            logits[3, :600] = -torch.inf
        parameters = SamplingParameters(
            torch.where(torch.arange(num_rows) % 2 == 0, 0.0, 0.8), torch.zeros(num_rows, dtype=torch.int32),
            torch.ones(num_rows), torch.zeros(num_rows), torch.arange(num_rows) * 77 + 5,
            torch.arange(num_rows, dtype=torch.int32) + 3,
        )  # fmt: skip
        on_gpu = SamplingParameters(*(getattr(parameters, name).cuda() for name in parameters.__slots__))
        mine = logits[:, first : first + share[comm.rank]].cuda()
        expected, target = TokenTarget.create(num_rows, torch.device("cpu")), TokenTarget.create(num_rows, mine.device)
        ReferenceSampler().argmax(logits, expected)
        choice.argmax(mine, target)
        found += [expected.tokens_R.tolist(), target.tokens_R.tolist()]
        ReferenceSampler().sample(logits, parameters, expected, has_limits=False)
        choice.sample(mine, on_gpu, target, has_limits=False)
        found += [expected.tokens_R.tolist(), target.tokens_R.tolist()]
    newest = torch.zeros(9, dtype=torch.int32, device="cuda")
    choice.argmax(mine[:1], TokenTarget(target.tokens_R[:1], torch.tensor([4], dtype=torch.int32).cuda(), newest))
    return found, newest.tolist()


def test_tokens_are_those_of_all_logits(ranks: RankProcesses) -> None:
    for found, newest in ranks.call(_choose):
        for expected, ours in zip(found[::2], found[1::2], strict=True):
            assert ours == expected
        assert newest == [0, 0, 0, 0, 500, 0, 0, 0, 0]


def _outlive(comm: Comm, dies: int, num_rows: int) -> tuple[int | None, float, float]:
    sums = Sums(comm, 256, torch.float32, 100)
    sums.fill(num_rows, 1)
    for _ in range(3):
        sums.add_norm(num_rows)
    torch.cuda.synchronize()
    comm.agree_min(0)
    if comm.rank == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    start_s = time.monotonic()
    for _ in range(20):
        sums.add_norm(num_rows)
    torch.cuda.synchronize()
    waited_s = time.monotonic() - start_s
    for _ in range(64):
        sums.add_norm(num_rows)
    torch.cuda.synchronize()
    return sums.memory.silent_rank(), waited_s, time.monotonic() - start_s - waited_s


@pytest.mark.parametrize("num_rows", [4, 100])
def test_a_dead_rank_is_named_and_nothing_hangs(num_rows: int) -> None:
    with RankProcesses(2, on_gpus=True) as ranks:
        ranks.send(_outlive, 1, num_rows)
        silent, waited_s, later_s = ranks.result(0, 60.0)
    assert silent == 1
    assert LIMIT_S * 0.9 < waited_s < LIMIT_S + 2
    assert later_s < 2, "later waits end at once"
