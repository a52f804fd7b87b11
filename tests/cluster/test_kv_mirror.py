"""A mirror equals the gang's own cache whenever it says that it is in step, whatever is lost, repeated or reordered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.cluster.block_hash import block_hashes, next_hash, root_hash
from tensorweave.cluster.errors import WireError
from tensorweave.cluster.kv_mirror import KvMirror

SIZE = 4
ROOT = root_hash(None)


def name(number: int) -> bytes:
    return number.to_bytes(8, "little")


def test_names_are_chained_over_salt_and_tokens() -> None:
    tokens = list(range(11))
    names = block_hashes(tokens, SIZE, None)
    assert names == [next_hash(ROOT, tokens[:4]), next_hash(next_hash(ROOT, tokens[:4]), tokens[4:8])]
    assert block_hashes(tokens[:3], SIZE, None) == []
    assert block_hashes([*tokens[:4], 99, *tokens[5:]], SIZE, None)[0] == names[0]
    assert block_hashes([*tokens[:4], 99, *tokens[5:]], SIZE, None)[1] != names[1]
    assert not set(names) & set(block_hashes(tokens, SIZE, "salt"))


def test_cached_tokens_count_whole_leading_blocks() -> None:
    mirror = KvMirror(SIZE, 10)
    names = block_hashes(range(12), SIZE, None)
    assert mirror.cached_tokens(names) == 0
    mirror.apply(["kv", 0, 0, [["stored", ROOT, names[0]], ["stored", names[1], names[2]]]])
    assert mirror.cached_tokens(names) == 4
    mirror.apply(["kv", 0, 2, [["stored", names[0], names[1]]]])
    assert mirror.cached_tokens(names) == 12
    mirror.apply(["kv", 0, 3, [["removed", names[1], names[2]]]])
    assert mirror.cached_tokens(names) == 4
    mirror.apply(["kv", 0, 4, [["cleared"]]])
    assert (mirror.cached_tokens(names), len(mirror)) == (0, 0)


def test_a_gap_empties_the_mirror_until_the_snapshot() -> None:
    mirror = KvMirror(SIZE, 10)
    mirror.apply(["kv", 3, 0, [["stored", ROOT, name(1)]]])
    assert mirror.apply(["kv", 3, 2, [["stored", ROOT, name(2)]]])
    assert not mirror.is_synced
    assert mirror.cached_tokens([name(1)]) == 0
    assert not mirror.apply(["kv", 3, 3, [["stored", ROOT, name(3)]]])
    assert mirror.apply(["kv_snapshot", 3, 3, []])  # taken before the newest event
    assert not mirror.apply(["kv_snapshot", 3, 4, [[name(n), ROOT] for n in (1, 2, 3)]])
    assert mirror.is_synced
    assert (len(mirror), mirror.num_resyncs) == (3, 1)


def test_a_late_subscriber_requests_a_snapshot() -> None:
    mirror = KvMirror(SIZE, 10)
    assert mirror.apply(["kv", 0, 7, [["stored", ROOT, name(1)]]])
    assert not mirror.apply(["kv_snapshot", 0, 8, [[name(1), ROOT]]])
    assert mirror.cached_tokens([name(1)]) == SIZE


def test_a_new_epoch_empties_the_mirror_and_an_old_one_is_ignored() -> None:
    mirror = KvMirror(SIZE, 10)
    mirror.apply(["kv", 1, 0, [["stored", ROOT, name(1)]]])
    assert not mirror.apply(["kv", 2, 0, [["stored", ROOT, name(2)]]])
    assert not mirror.apply(["kv", 1, 1, [["stored", ROOT, name(3)]]])
    assert not mirror.apply(["kv_snapshot", 1, 9, [[name(4), ROOT]]])
    assert [mirror.cached_tokens([name(n)]) for n in (1, 2, 3, 4)] == [0, SIZE, 0, 0]


def test_memory_is_bounded() -> None:
    mirror = KvMirror(SIZE, 4)
    assert mirror.apply(["kv", 0, 0, [["stored", ROOT, *(name(n) for n in range(5000))]]])
    assert len(mirror) == 0
    with pytest.raises(WireError, match="at most"):
        mirror.apply(["kv_snapshot", 0, 1, [[name(n), ROOT] for n in range(5000)]])


@pytest.mark.parametrize(
    "frame",
    [
        ["kv"],
        ["kv", "0", 0, []],
        ["kv", 0, 0, [["stored", "x"]]],
        ["kv", 0, 0, [["stored", ROOT, 5]]],
        ["kv", 0, 0, [["other"]]],
        ["kv", 0, 0, ["stored"]],
        ["kv_snapshot", 0, 0, [[name(1)]]],
        ["kv_snapshot", 0, 0, "x"],
    ],
)
def test_malformed_frames_are_refused(frame: list[Any]) -> None:
    with pytest.raises(WireError, match="malformed"):
        KvMirror(SIZE, 10).apply(frame)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(0, 15), st.integers(1, 3)),
        st.tuples(st.just("remove"), st.integers(0, 15), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(steps=STEPS, fates=st.lists(st.sampled_from(["keep", "keep", "keep", "drop", "twice", "late"]), max_size=60))
def test_a_synced_mirror_equals_the_journal(steps: list[tuple[str, int, int]], fates: list[str]) -> None:
    """Frames are dropped, repeated and swapped, incarnations begin anew. Once the newest event was heard, the mirror
    holds what the gang holds."""
    gang: set[bytes] = set()
    epoch, seq = 0, 0
    mirror = KvMirror(SIZE, 100)
    fate = iter(fates)
    delayed: list[list[Any]] = []

    def hear(frame: list[Any]) -> None:
        while mirror.apply(frame):
            frame = ["kv_snapshot", epoch, seq, [[known, ROOT] for known in sorted(gang)]]

    def deliver(frame: list[Any]) -> None:
        match next(fate, "keep"):
            case "drop":
                return
            case "late":
                delayed.append(frame)
                return
            case "twice":
                hear(frame)
        hear(frame)
        while delayed:
            hear(delayed.pop(0))

    for kind, number, count in steps:
        events: list[list[Any]] = []
        if kind == "restart":
            epoch, seq = epoch + 1, 0
            gang.clear()
            continue
        if kind == "store":
            names = [name(number + i) for i in range(count)]
            gang.update(names)
            events = [["stored", ROOT, *names]]
        elif kind == "remove":
            gang.discard(name(number))
            events = [["removed", name(number)]]
        else:
            gang.clear()
            events = [["cleared"]]
        frame = ["kv", epoch, seq, events]
        seq += 1
        deliver(frame)
    gang.add(name(99))
    seq += 1
    hear(["kv", epoch, seq - 1, [["stored", ROOT, name(99)]]])
    assert mirror.is_synced
    assert len(mirror) == len(gang)
    hear(["kv_snapshot", epoch, seq, [[known, ROOT] for known in sorted(gang)]])
    assert mirror.is_synced
    assert {n for n in range(100) if mirror.cached_tokens([name(n)])} == {int.from_bytes(n, "little") for n in gang}
    assert len(mirror) == len(gang)
