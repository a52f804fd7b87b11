"""`OfferedBlocks` and the generations of pool blocks."""

from __future__ import annotations

from tensorweave.workers.transfer.read_request import BlockHeader
from tensorweave.workers.transfer.sending.offered_blocks import BlockGenerations, OfferedBlocks
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES, PoolLoader
from tests.workers.transfer.blocks import random_window


def read(offered: OfferedBlocks, headers: list[BlockHeader]) -> bytes | None:
    loader = PoolLoader(offered.window, HOST_MESSAGE_BYTES)
    return offered.read(headers, range(3), offered.window.new_staging(len(headers) * loader.block_bytes(3)), loader)


def test_an_offer_grows_and_is_withdrawn() -> None:
    window, generations = random_window(), BlockGenerations()
    offered = OfferedBlocks(window, generations, "prompt")
    assert offered.headers([0, 1]) == []
    offered.add([3, 6], [4, 4])
    offered.add([1], [2])
    headers = offered.headers([0, 1, 2, 3])
    assert [(header.index, header.num_tokens) for header in headers] == [(0, 4), (1, 4), (2, 2)]
    assert read(offered, headers) is not None
    offered.withdraw()
    assert read(offered, headers) is None
    offered.add([3, 6], [4, 4])
    again = offered.headers([0, 1])
    assert [header.generation for header in again] == [header.generation + 1 for header in headers[:2]]
    assert read(offered, headers[:1]) is None
    assert read(offered, again) is not None
    offered.withdraw()
    assert read(offered, again) is None
    assert generations.num_held == 0


def test_a_block_on_two_offers_keeps_its_generation_until_both_are_withdrawn() -> None:
    window, generations = random_window(), BlockGenerations()
    one, other = OfferedBlocks(window, generations, "a"), OfferedBlocks(window, generations, "b")
    one.add([4], [4])
    other.add([4, 5], [4, 4])
    one.withdraw()
    assert read(other, other.headers([0, 1])) is not None
    assert generations.generation(4) == 0
    other.withdraw()
    assert (generations.generation(4), generations.generation(5)) == (1, 1)
