"""Sums over ranks and tokens from shares of a vocabulary, in torch: ranks are threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.norm.reference import rms_norm
from tensorweave.kernels.ranks.reference import ReferenceChoice, ReferenceSums
from tensorweave.kernels.ranks.sums import share_of
from tensorweave.kernels.sample.reference import ReferenceSampler
from tensorweave.kernels.sample.rule import SamplingParameters, TokenTarget
from tensorweave.workers.gang.comm import Comm
from tests.workers.engine_drive import run_ranks

CPU = torch.device("cpu")
D, EPSILON = 24, 1e-5


def sums_of(comm: Comm, dtype: torch.dtype) -> ReferenceSums:
    return ReferenceSums(comm.gather_columns, comm.rank, comm.size, D, dtype, CPU)


@pytest.mark.parametrize(("rows", "shares"), [(7, [4, 3]), (1, [1, 0, 0]), (9, [3, 3, 3]), (10, [3, 3, 3, 1])])
def test_shares_cover_the_rows(rows: int, shares: list[int]) -> None:
    slices = [share_of(rows, rank, len(shares)) for rank in range(len(shares))]
    assert [len(range(rows)[each]) for each in slices] == shares
    assert [row for each in slices for row in range(rows)[each]] == list(range(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_have_the_sum_in_rank_order_and_its_norm(dtype: torch.dtype, size: int) -> None:
    rows = 5
    parts, before = torch.randn(size, rows, D).to(dtype), torch.randn(rows, D).to(dtype)
    gain = torch.randn(D).to(dtype)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()

    def work(comm: Comm) -> list[tuple[Tensor, Tensor]]:
        sums, found = sums_of(comm, dtype), []
        part, x, out = (sums.empty(rows) for _ in range(3))
        for how in ({}, {"is_first": True}, {"is_whole": False}):
            part.copy_(parts[comm.rank])
            x.copy_(before)
            sums.add_norm(part, x, gain, EPSILON, out, **how)
            found.append((x.clone(), out.clone()))
        sums.add_norm(part, x, gain, EPSILON, out)
        return [*found, (x.clone(), out.clone())]

    added = (before.float() + total).to(dtype)
    expected = [added, total.to(dtype), added, (added.float() + total).to(dtype)]
    for rank, found in enumerate(run_ranks(size, work)):
        for step, ((x, out), exact) in enumerate(zip(found, expected, strict=True)):
            mine = share_of(rows, rank, size) if step == 2 else slice(None)
            assert torch.equal(x[mine], exact[mine])
            assert torch.equal(out, rms_norm(exact, gain, EPSILON))
        assert found[2][0].isnan().any(), "rows that need not be right are not"


@pytest.mark.parametrize("shares", [(60, 40), (10, 30, 60)])
def test_tokens_are_those_of_all_logits(shares: tuple[int, ...]) -> None:
    R, V = 8, sum(shares)
    logits = torch.randn(R, V)
    logits[0, [70, 5, 50]] = 9.0
    logits[1] = -torch.inf
    logits[2, 99] = torch.nan
    logits[3, : shares[0]] = -torch.inf
    logits[4, 7] = torch.inf
    parameters = SamplingParameters(
        torch.where(torch.arange(R) % 2 == 0, 0.0, 0.8), torch.zeros(R, dtype=torch.int32), torch.ones(R),
        torch.zeros(R), torch.arange(R) * 77 + 5, torch.arange(R, dtype=torch.int32),
    )  # fmt: skip
    slots = torch.arange(R, dtype=torch.int32).flip(0)

    def target() -> TokenTarget:
        return TokenTarget(torch.empty(R, dtype=torch.int64), slots, torch.zeros(R, dtype=torch.int32))

    def work(comm: Comm) -> list[TokenTarget]:
        first, found = sum(shares[: comm.rank]), [target(), target()]
        mine = logits[:, first : first + shares[comm.rank]].contiguous()
        choice = ReferenceChoice(comm.gather_columns, comm.size, first)
        choice.argmax(mine, found[0])
        choice.sample(mine, parameters, found[1], has_limits=False)
        return found

    expected = [target(), target()]
    ReferenceSampler().argmax(logits, expected[0])
    ReferenceSampler().sample(logits, parameters, expected[1], has_limits=False)
    for found in run_ranks(len(shares), work):
        for ours, exact in zip(found, expected, strict=True):
            assert ours.tokens_R.tolist() == exact.tokens_R.tolist()
            assert torch.equal(ours.newest_S, exact.newest_S)
