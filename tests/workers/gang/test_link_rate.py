"""What a gang's link carries is measured with its own collectives; a slow link is not measured for long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.gang import link_rate
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.link_rate import measure_link
from tests.workers.engine_drive import run_ranks

CPU = torch.device("cpu")


def test_every_rank_measures_alike() -> None:
    rates = run_ranks(3, lambda comm: measure_link(comm, CPU))
    assert all(rate.bytes_per_s > 0 and rate.latency_s > 0 for rate in rates)


@pytest.mark.parametrize(("bytes_per_s", "largest"), [(1.25e6, 64 << 10), (1e9, 2 << 20)])
def test_a_link_is_measured_with_what_it_can_carry(
    monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, largest: int
) -> None:
    sizes: list[int] = []

    def take(comm: Comm, device: torch.device, num_bytes: int) -> float:
        sizes.append(num_bytes)
        return 1e-4 + num_bytes / bytes_per_s

    monkeypatch.setattr(link_rate, "_all_reduce_s", take)
    comm: Any = _Two()
    rate = measure_link(comm, CPU)
    assert max(sizes) == largest
    assert rate.bytes_per_s == pytest.approx(bytes_per_s, rel=0.1)  # of two ranks each sends all bytes once
    assert rate.latency_s == pytest.approx(1e-4, rel=0.1)
    assert sum(sizes) / bytes_per_s < 2


class _Two:
    place = MeshRank(0, Mesh(tensor=2))

    def agree_min(self, value: int) -> int:
        return value
