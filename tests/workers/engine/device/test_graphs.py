"""How many rows a step is computed with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tensorweave.workers.engine.device.graphs import GraphSizes, StepGraphs


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 9), (100, 100)])
def test_a_step_takes_the_next_larger_graph(rows: int, padded: int) -> None:
    assert GraphSizes((1, 2, 4, 8)).padded(rows) == padded


def test_without_padding_a_step_has_its_own_rows() -> None:
    assert [GraphSizes((1, 4), is_padding=False).padded(rows) for rows in (1, 2, 4)] == [1, 2, 4]


def test_a_step_is_made_once() -> None:
    made: list[int] = []
    run: list[int] = []

    def make(num_rows: int) -> Callable[[], None]:
        made.append(num_rows)
        return lambda: run.append(num_rows)

    graphs = StepGraphs(make, torch.device("cpu"))
    for num_rows in (2, 2, 7, 2):
        graphs.run(num_rows)
    assert (made, run) == ([2, 7], [2, 2, 7, 2])
