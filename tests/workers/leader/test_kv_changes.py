"""Changes of the KV cache are sent at once, or with others of the same moment, in order and by epoch."""

from __future__ import annotations

import asyncio
from typing import Any

from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tensorweave.workers.leader.kv_journal import KV_INTERVAL_S, KvChanges, KvJournal

_ROOT = "00" * 8


def _stored(number: int) -> dict[str, Any]:
    blocks = [{"block_hash": number.to_bytes(8, "big").hex()}]
    return {"event_id": number, "data": {"type": "stored", "parent_hash": _ROOT, "blocks": blocks}}


def test_the_changes_of_an_interval_go_into_one_frame() -> None:
    async def body() -> None:
        journal, mirror, sent = KvJournal(), KvMirror(32, 100), list[tuple[float, int]]()
        loop = asyncio.get_running_loop()

        def send(fields: list[Any]) -> None:
            sent.append((loop.time(), len(fields[2])))
            assert not mirror.apply(["kv", *fields])

        changes = KvChanges(send)

        def note(number: int) -> None:
            fields = journal.add([_stored(number)])
            assert fields is not None
            changes.add(fields)

        mirror.apply(["kv_snapshot", *journal.snapshot()])
        for number in range(4):
            note(number)
        assert sent == [(0.0, 1)]
        await asyncio.sleep(1.0)
        assert sent[1:] == [(KV_INTERVAL_S, 3)]
        note(4)
        mirror.apply(["kv_snapshot", *journal.snapshot()])
        assert len(mirror) == 5
        note(5)
        mirror.apply(["kv_snapshot", *journal.snapshot()])  # a client that subscribes before the frame is sent
        await asyncio.sleep(1.0)
        assert sent[2:] == [(1.0, 1), (1.0 + KV_INTERVAL_S, 1)]
        assert len(mirror) == 6

    run_stepped(body())


def test_a_lost_event_begins_an_epoch_in_a_frame_of_its_own() -> None:
    async def body() -> None:
        journal, sent = KvJournal(), list[list[Any]]()
        changes = KvChanges(sent.append)
        for number in (0, 1, 3, 4):
            fields = journal.add([_stored(number)])
            assert fields is not None
            changes.add(fields)
        await asyncio.sleep(1.0)
        assert [(epoch, first_seq, len(batch)) for epoch, first_seq, batch in sent] == [(0, 0, 1), (0, 1, 1), (1, 0, 2)]

    run_stepped(body())
