"""The start of a step on a device: tokens and block tables, the Triton form against the one in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tensorweave.kernels.step import reference
from tensorweave.kernels.step import triton as step
from tensorweave.kernels.step.reference import FROM_DEVICE, SequenceState, TableUpdate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("num_rows", "num_entries"), [(1, 1), (7, 33), (300, 4), (512, 1000)])
def test_equals_the_reference(num_rows: int, num_entries: int, device: torch.device) -> None:
    num_slots, width = num_rows + 3, 9

    def numbers(low: int, high: int, *shape: int) -> Any:
        return torch.randint(low, high, shape, device=device).int()

    slots, given = torch.randperm(num_slots, device=device)[:num_rows].int(), numbers(0, 1000, num_rows)
    given[::2] = FROM_DEVICE
    places = torch.randperm(num_slots * width, device=device)[:num_entries].int()
    update = TableUpdate(places, numbers(0, 5000, len(places)))
    tables, newest = numbers(0, 5000, num_slots, width), numbers(0, 1000, num_slots)
    states = [SequenceState(tables.clone(), newest.clone()) for _ in range(2)]
    tokens, expected = (torch.full((num_rows + 5,), -7, dtype=torch.int32, device=device) for _ in range(2))
    step.begin_step(slots, given, states[0], update, tokens[2 : 2 + num_rows])
    reference.begin_step(slots, given, states[1], update, expected[2 : 2 + num_rows])
    assert torch.equal(tokens, expected), "the rows' tokens, and nothing beside them"
    assert torch.equal(states[0].tables_SW, states[1].tables_SW)
    assert torch.equal(states[0].tokens_S, newest)
