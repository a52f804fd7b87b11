"""Frames survive any cut, and nothing that a peer sends can do more than close its connection."""

from __future__ import annotations

import asyncio
import itertools
import struct

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.cluster import wire
from tensorweave.cluster.errors import WireError
from tensorweave.cluster.protocol import PROTOCOL_VERSION

_SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)
_FRAMES = st.lists(st.tuples(st.text(min_size=1), st.lists(_VALUES, max_size=4)), max_size=6)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(frames=_FRAMES, cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_frames_survive_any_cut(frames: list[tuple[str, list[object]]], cuts: list[int]) -> None:
    stream = b"".join(wire.pack_frame(name, *fields) for name, fields in frames)
    decoder = wire.FrameDecoder()
    received = [frame for piece in _cut(stream, cuts) for frame in decoder.feed(piece)]
    assert received == [[name, *fields] for name, fields in frames]


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=5))
def test_random_bytes_give_frames_or_wire_errors(data: bytes, cuts: list[int]) -> None:
    decoder = wire.FrameDecoder(max_frame_bytes=1 << 20)
    try:
        frames = [frame for piece in _cut(data, cuts) for frame in decoder.feed(piece)]
    except WireError:
        return
    assert all(isinstance(frame, list) and isinstance(frame[0], str) for frame in frames)


@settings(max_examples=500, deadline=None)
@given(payload=st.binary(min_size=1, max_size=200))
def test_a_random_payload_gives_a_frame_or_a_wire_error(payload: bytes) -> None:
    try:
        frame = wire.unpack_payload(payload)
    except WireError:
        return
    assert isinstance(frame[0], str)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x91",  # an array that is cut short
        msgpack.packb([]),
        msgpack.packb("step"),
        msgpack.packb({"step": 1}),
        msgpack.packb([1, "step"]),
        msgpack.packb([b"step"]),
        msgpack.packb(["step"]) + b"\x00",
        msgpack.packb(["step", msgpack.ExtType(5, b"x")]),
        b"\x92\xa4step\x81\x01\x02",  # a map with a number as its key
        b"\x91\xa4\xff\xff\xff\xff",  # a name that is not UTF-8
        b"\x91" * 5000,  # nested past any depth
        b"\xdd\xff\xff\xff\xff",  # an array of four milliards of elements
    ],
)
def test_malformed_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack_payload(payload)


def test_a_length_over_the_limit_is_refused_before_its_bytes_come() -> None:
    decoder = wire.FrameDecoder(max_frame_bytes=1000)
    with pytest.raises(WireError, match="1001 bytes is over the limit of 1000"):
        list(decoder.feed(struct.pack("<I", 1001)))


def test_a_raised_limit_holds_for_the_next_frame_of_the_same_read() -> None:
    decoder = wire.FrameDecoder(max_frame_bytes=64)
    frames = decoder.feed(wire.pack_frame("hello") + wire.pack_frame("add", b"x" * 500))
    assert next(frames) == ["hello"]
    decoder.max_frame_bytes = 1000
    assert next(frames) == ["add", b"x" * 500]


def test_frames_over_the_limit_are_not_sent() -> None:
    with pytest.raises(WireError, match="over the limit"):
        wire.pack_frame("add", b"x" * wire.MAX_FRAME_BYTES)


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (["add", 1, 2], "first frame must be hello"),
        (["hello", PROTOCOL_VERSION], "first frame must be hello"),
        (["hello", PROTOCOL_VERSION + 1, "secret"], "protocol version"),
        (["hello", PROTOCOL_VERSION, "other"], "wrong secret"),
        (["hello", PROTOCOL_VERSION, 7], "wrong secret"),
        (["hello", PROTOCOL_VERSION, "sécret"], "wrong secret"),
    ],
)
def test_hello_is_checked(frame: wire.Frame, complaint: str) -> None:
    wire.check_hello(["hello", PROTOCOL_VERSION, "secret"], "secret")
    with pytest.raises(WireError, match=complaint):
        wire.check_hello(frame, "secret")


def test_a_reader_ends_where_the_stream_ends_inside_a_frame() -> None:
    async def read() -> list[wire.Frame]:
        stream = asyncio.StreamReader()
        stream.feed_data(wire.pack_frame("ping") + wire.pack_frame("ping")[:-1])
        stream.feed_eof()
        return [frame async for frame in wire.FrameReader(stream)]

    assert asyncio.run(read()) == [["ping"]]
