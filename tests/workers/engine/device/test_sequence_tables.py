"""Slots go to the smallest free number, and only what the device lacks of a block table is noted."""

from __future__ import annotations

import numpy as np
import pytest

from tensorweave.workers.engine.device.sequence_tables import SequenceTables
from tensorweave.workers.step.request import RequestState
from tests.workers.engine_drive import make_request

WIDTH = 8


def changes(tables: SequenceTables) -> dict[int, int]:
    places, blocks = tables.take_changes()
    return dict(zip(places.tolist(), blocks.tolist(), strict=True))


def test_growth_is_noted_once() -> None:
    tables, request, blocks = SequenceTables(4, WIDTH), make_request(0, [1]), [7, 3]
    assert tables.slot_of(request, blocks) == 0
    assert changes(tables) == {0: 7, 1: 3}
    assert tables.slot_of(request, blocks) == 0
    assert changes(tables) == {}
    blocks.append(5)
    tables.slot_of(request, blocks)
    assert changes(tables) == {2: 5}
    assert tables.tables_SW[0].tolist() == [7, 3, 5, 0, 0, 0, 0, 0]


def test_another_list_is_sent_whole() -> None:
    tables, first, second = SequenceTables(4, WIDTH), make_request(0, [1]), make_request(1, [1])
    tables.slot_of(first, [1, 2])
    blocks = [4, 5, 6]
    assert tables.slot_of(second, blocks) == 1
    changes(tables)
    exchanged = [4, 9, 6]
    tables.slot_of(second, exchanged)
    assert changes(tables) == {WIDTH: 4, WIDTH + 1: 9, WIDTH + 2: 6}
    del exchanged[2:]
    shorter = [4, 9]
    tables.slot_of(second, shorter)
    assert changes(tables) == {WIDTH: 4, WIDTH + 1: 9}


def test_the_smallest_free_slot_is_taken() -> None:
    tables = SequenceTables(3, WIDTH)
    requests = [make_request(order, [1]) for order in range(3)]
    assert [tables.slot_of(request, [1]) for request in requests] == [0, 1, 2]
    tables.free_resources(requests[1])
    tables.free_resources(requests[0])
    tables.free_resources(requests[0])
    assert [tables.slot_of(make_request(order, [1]), [1]) for order in (5, 6)] == [0, 1]


def test_requests_that_are_over_give_way() -> None:
    """They may keep their blocks for others to fetch, but not a slot."""
    tables = SequenceTables(2, WIDTH)
    over, running = make_request(0, [1]), make_request(1, [1])
    tables.slot_of(over, [1])
    tables.slot_of(running, [2])
    with pytest.raises(ValueError, match="more than 2 requests"):
        tables.slot_of(make_request(2, [1]), [3])
    over.state = RequestState.CLOSING
    assert tables.slot_of(make_request(3, [1]), [3]) == 0
    assert np.array_equal(tables.tables_SW[:2, 0], [3, 2])
    tables.free_resources(over)
    assert tables.slot_of(running, [2]) == 1
