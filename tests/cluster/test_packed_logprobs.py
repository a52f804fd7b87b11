"""What is packed reads as what it was packed from; what does not fit together is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.packed_logprobs import PackedLogprobs
from tensorweave.cluster.protocol import Logprob, TokenChunk

LOGPROBS = st.builds(
    Logprob, st.integers(0, 2**31 - 1), st.floats(max_value=0.0, allow_nan=False), st.integers(1, 200_000)
)
ROWS = st.lists(st.lists(LOGPROBS, max_size=4).map(tuple), max_size=6)


@given(rows=ROWS)
def test_it_reads_as_the_rows(rows: list[Any]) -> None:
    packed = PackedLogprobs.from_wire(msgpack.unpackb(msgpack.packb(PackedLogprobs.pack(rows).to_wire())))
    assert packed == rows
    assert (len(packed), packed.num_logprobs) == (len(rows), sum(map(len, rows)))
    assert packed[1:3] == rows[1:3]
    assert [packed[index] for index in range(-len(rows), 0)] == rows
    assert all(
        type(value) is kind for row in packed for p in row for value, kind in zip(p, (int, float, int), strict=True)
    )


def test_a_chunk_counts_them_without_making_them() -> None:
    row = (Logprob(5, -1.0, 1), Logprob(6, -2.0, 2))
    chunk = TokenChunk("r", [7], logprobs=[row], prompt_logprobs=[row] * 3)
    again = TokenChunk.from_wire(msgpack.unpackb(msgpack.packb(chunk.to_wire())))
    assert isinstance(again.prompt_logprobs, PackedLogprobs)
    assert again.num_logprobs == chunk.num_logprobs == 8
    assert again == chunk


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [b"", b"", b""],
        [b"", b"", b"", b"", b""],
        [b"\x01", b"", b"", b""],  # no whole number
        [b"\x01\0\0\0", b"", b"", b""],  # a row without its values
        [b"\x02\0\0\0\x01\0\0\0", b"\0" * 4, b"\0" * 8, b"\0" * 4],  # ends that fall
        [b"", b"\0" * 4, b"\0" * 8, b"\0" * 4],  # values without a row
        ["", "", "", ""],
    ],
)
def test_what_does_not_fit_together_is_refused(fields: Any) -> None:
    with pytest.raises(WireError):
        PackedLogprobs.from_wire(fields)
