"""`PoolWindow`: blocks packed, unpacked and digested, head by head."""

from __future__ import annotations

import torch

from tests.workers.transfer.blocks import packed, random_window


def test_blocks_go_from_one_pool_to_another_head_by_head() -> None:
    source, target = random_window(3), random_window(2, first_head=1)
    payload = packed(source, [5, 2, 5], range(1, 3))
    target.unpack([0, 1, 7], range(2), payload)
    for theirs, ours in zip([5, 2, 5], [0, 1, 7], strict=True):
        assert torch.equal(target.digest(ours, 4), source.digest(theirs, 4)[:, 1:])
    assert torch.equal(packed(target, [0, 1, 7], range(2)), payload)
    found = target.payload_digests(payload, 2, [4, 4, 1])
    assert torch.equal(found[1], source.digest(2, 4)[:, 1:])
    assert torch.equal(found[2], source.digest(5, 1)[:, 1:])
