"""`BlockReceiver`: only verified blocks are written into the pool, and each fault is counted by its kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorweave.workers.transfer.read_request import BlockHeader
from tensorweave.workers.transfer.receiving.block_receiver import BlockReceiver, TargetBlocks
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tests.workers.transfer.blocks import packed, random_window


class WantedBlocks:
    """Blocks 1 and 2 of a prompt, which must arrive in blocks 6 and 7 of another pool."""

    def __init__(self) -> None:
        self.source, self.pool = random_window(), random_window()
        self.source.unpack([3], range(3), packed(self.source, [0], range(3)) ^ 1)
        self.before = packed(self.pool, [6, 7], range(3))
        self.stats = TransferStats()
        self.target = TargetBlocks(self.pool, 1, [6, 7])
        self.receiver = BlockReceiver(self.target, range(3), {1: 4, 2: 3}, self.stats)
        self.payload = packed(self.source, [3, 4], range(3))
        digests = torch.stack([self.source.digest(3, 4), self.source.digest(4, 3)]).numpy().tobytes()
        self.receiver.announce([BlockHeader(1, 10, 4), BlockHeader(2, 20, 3)], digests)

    def put(self, blocks: list[tuple[int, int]], payload: torch.Tensor | None = None) -> dict[Any, int]:
        self.receiver.put(blocks, self.payload if payload is None else payload)
        return self.stats.failures()

    @property
    def written(self) -> torch.Tensor:
        return packed(self.pool, [6, 7], range(3))


ANNOUNCED = [(1, 10), (2, 20)]


def test_valid_blocks_are_written() -> None:
    wanted = WantedBlocks()
    assert wanted.put(ANNOUNCED) == {}
    assert torch.equal(wanted.written, wanted.payload)
    assert wanted.receiver.num_leading_verified() == 2
    assert wanted.receiver.take_missing() == []


def test_only_the_valid_blocks_of_a_message_are_written() -> None:
    wanted = WantedBlocks()
    wanted.payload[3] ^= 4
    assert wanted.put(ANNOUNCED) == {"digest": 1}
    half = len(wanted.payload) // 2
    assert torch.equal(wanted.written[half:], wanted.payload[half:])
    assert torch.equal(wanted.written[:half], wanted.before[:half])
    assert (wanted.receiver.num_leading_verified(), wanted.receiver.take_missing()) == (0, [1])
    assert wanted.stats.failures() == {"digest": 1}


@pytest.mark.parametrize(
    ("blocks", "counted"),
    [
        ([(1, 9), (2, 19)], {"stale": 2}),
        ([(0, 10), (5, 20)], {"stale": 2}),
        ([(2, 20), (1, 10)], {"digest": 2}),
        ([(1, 10)], {"truncated": 1}),
        ([(1, 10), (2, 20), (2, 20)], {"truncated": 3}),
    ],
)
def test_invalid_blocks_are_never_written(blocks: list[tuple[int, int]], counted: dict[str, int]) -> None:
    wanted = WantedBlocks()
    assert wanted.put(blocks) == counted
    assert torch.equal(wanted.written, wanted.before)
    assert wanted.receiver.num_leading_verified() == 0


def test_digests_of_the_wrong_length_are_ignored() -> None:
    wanted = WantedBlocks()
    for digests in (b"", bytes(8), bytes(8 * 2 * 2 * 3 + 8)):
        wanted.receiver.announce([BlockHeader(1, 11, 4), BlockHeader(2, 21, 3)], digests)
    assert wanted.put(ANNOUNCED) == {"truncated": 6}
    assert wanted.receiver.num_leading_verified() == 2


def test_a_duplicate_is_not_written() -> None:
    wanted = WantedBlocks()
    wanted.put(ANNOUNCED)
    assert wanted.put(ANNOUNCED, wanted.payload ^ 255) == {"duplicate": 2}
    assert torch.equal(wanted.written, wanted.payload)


def test_a_late_block_is_not_written() -> None:
    wanted = WantedBlocks()
    wanted.target.close()
    assert wanted.put(ANNOUNCED) == {"late": 2}
    assert torch.equal(wanted.written, wanted.before)
