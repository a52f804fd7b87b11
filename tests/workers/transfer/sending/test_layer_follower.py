"""Layers are offered as they are computed, and cursors send each of them once."""

from __future__ import annotations

import torch

from tensorweave.kernels.blocks.digest import combine_digests
from tensorweave.workers.step.layer_marks import LayersDone
from tensorweave.workers.transfer.block_part import BlockPart
from tensorweave.workers.transfer.read_request import ReadRequest
from tensorweave.workers.transfer.sending.block_cursor import PartCursor
from tensorweave.workers.transfer.sending.layer_follower import FollowedChunk, LayerFollower
from tensorweave.workers.transfer.sending.offered_blocks import BlockGenerations, OfferedBlocks
from tests.workers.transfer.blocks import random_window
from tests.workers.transfer.marks import TestMark
from tests.workers.waiting import wait_until

NOTHING = torch.empty(0, dtype=torch.uint8)
Sent = list[tuple[list[int], range]]


class BrokenDevice:
    def wait(self) -> None:
        raise RuntimeError("the device has failed")

    def query(self) -> bool:
        raise RuntimeError("the device has failed")


class Offer:
    """Blocks of a window of two layers, and a cursor for heads 1 and 2 of them."""

    def __init__(self, message_blocks: int = 8, first_block: int = 0, only: tuple[int, ...] = ()) -> None:
        self.window = random_window()
        self.offered = OfferedBlocks(self.window, BlockGenerations(), "prompt")
        request = ReadRequest("r", "t", {}, "prompt", 1, 2, first_block, only)
        self.cursor = PartCursor(request, range(1, 3), self.window, message_blocks * self.window.block_bytes(2))
        self.told: list[str] = []
        self.follower = LayerFollower(self.window, lambda ticket_id, offered: self.told.append(ticket_id))

    def begin(self, block_ids: list[int], num_tokens: list[int]) -> tuple[FollowedChunk, list[LayersDone]]:
        first = len(self.offered)
        epoch = self.offered.begin(block_ids, num_tokens)
        chunk = FollowedChunk("t", self.offered, epoch, first, block_ids, num_tokens)
        return chunk, [LayersDone(range(layer, layer + 1), TestMark()) for layer in range(2)]

    def send(self) -> Sent:
        """What the cursor gives now; checks the digests."""
        sent: Sent = []
        while (part := self.cursor.next_blocks(self.offered, NOTHING)) is not None:
            assert isinstance(part, BlockPart)
            rows, layers = part.rows_N5.tolist(), part.layers
            digests = self.window.digests([row[3] for row in rows], [row[2] for row in rows], layers).numpy()
            assert (part.digests_N == combine_digests(digests[:, :, 1:3])).all()
            sent.append(([row[0] for row in rows], layers))
        return sent


def test_layers_are_offered_as_they_are_computed() -> None:
    offer = Offer()
    chunk, done = offer.begin([3, 6], [4, 4])
    offer.follower.follow([chunk], done)
    assert offer.send() == []
    done[0].mark.event.set()  # type: ignore[attr-defined]
    wait_until(lambda: offer.told == ["t"])
    assert offer.send() == [([0, 1], range(1))]
    assert offer.offered.num_complete == 0
    offer.offered.complete(5)
    assert not offer.offered.is_complete
    done[1].mark.event.set()  # type: ignore[attr-defined]
    wait_until(lambda: offer.told == ["t", "t"])
    assert offer.send() == [([0, 1], range(1, 2))]
    assert offer.offered.is_complete
    offer.follower.close()


def test_a_chunk_that_was_withdrawn_meanwhile_is_not_offered() -> None:
    offer = Offer()
    chunk, done = offer.begin([3, 6], [4, 4])
    offer.offered.withdraw()
    again, done_again = offer.begin([5], [4])
    for mark in [*done, *done_again]:
        mark.mark.event.set()  # type: ignore[attr-defined]
    offer.follower.follow([chunk], done)
    offer.follower.follow([again], done_again)
    wait_until(lambda: offer.told == ["t"])
    assert offer.send() == [([0], range(2))]
    offer.follower.close()


def test_layers_that_are_passed_already_are_offered_together() -> None:
    offer = Offer()
    chunk, done = offer.begin([3, 6], [4, 4])
    for layers_done in done:
        layers_done.mark.event.set()  # type: ignore[attr-defined]
    offer.follower.follow([chunk], done)
    wait_until(lambda: offer.offered.num_complete == 2)
    offer.follower.close()
    assert offer.told == ["t"]
    assert offer.send() == [([0, 1], range(2))]


def test_layers_that_wait_for_a_cursor_are_sent_together() -> None:
    offer = Offer(message_blocks=2)
    for first, block_ids in ((0, [3, 6]), (2, [1])):
        epoch = offer.offered.begin(block_ids, [4] * len(block_ids))
        for layer in range(2):
            digests = offer.window.digests(block_ids, [4] * len(block_ids), range(layer, layer + 1)).numpy()
            offer.offered.add_layers(epoch, range(first, first + len(block_ids)), range(layer, layer + 1), digests)
    assert offer.send() == [([0, 1], range(2)), ([2], range(2))]


def test_a_failure_of_the_thread_is_kept() -> None:
    offer = Offer()
    chunk, _ = offer.begin([3], [4])
    offer.follower.follow([chunk], [LayersDone(range(1), BrokenDevice())])
    wait_until(lambda: offer.follower.failure is not None)
    offer.follower.close()


def test_messages_are_bounded_and_follow_the_parts() -> None:
    offer = Offer(message_blocks=1, first_block=1)
    offer.offered.add([3, 6], [4, 4])
    epoch = offer.offered.begin([1, 2], [4, 2])
    for layer in range(2):
        digests = offer.window.digests([1, 2], [4, 2], range(layer, layer + 1)).numpy()
        assert offer.offered.add_layers(epoch, range(2, 4), range(layer, layer + 1), digests)
    assert offer.send() == [([1], range(2)), ([2, 3], range(1)), ([2, 3], range(1, 2))]


def test_after_a_withdrawal_only_what_is_not_complete_is_sent_again() -> None:
    offer = Offer()
    offer.offered.add([3], [4])
    epoch = offer.offered.begin([6], [4])
    offer.offered.add_layers(epoch, range(1, 2), range(1), offer.window.digests([6], [4], range(1)).numpy())
    assert offer.send() == [([0], range(2)), ([1], range(1))]
    offer.offered.withdraw()
    assert offer.send() == []
    offer.offered.add([7, 5], [4, 4])
    assert offer.send() == [([1], range(2))]


def test_named_blocks_are_sent_once_they_are_complete() -> None:
    offer = Offer(only=(0, 2))
    offer.offered.add([3, 6], [4, 4])
    assert offer.send() == [([0], range(2))]
    offer.offered.add([5], [4])
    assert offer.send() == [([2], range(2))]


def test_without_heads_nothing_is_sent() -> None:
    window = random_window()
    offered = OfferedBlocks(window, BlockGenerations(), "prompt")
    offered.add([1], [4])
    cursor = PartCursor(ReadRequest("r", "t", {}, "prompt", 0, 0, 0), range(0), window, 100)
    assert cursor.next_blocks(offered, NOTHING) is None
