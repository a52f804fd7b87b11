"""What crosses processes survives the crossing, and what does not fit its type is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensorweave.cluster.errors import Overloaded, RequestRejected, TensorweaveError, WireError, error_from_wire
from tensorweave.cluster.opaque_state import OpaqueState
from tensorweave.cluster.protocol import (
    GenerateRequest,
    KvEndpoint,
    KvSource,
    Logprob,
    ModelInfo,
    Retention,
    RetentionRange,
    SamplingSpec,
    Ticket,
    TokenChunk,
    pack_tokens,
    unpack_tokens,
)

SPEC = SamplingSpec(9, 2, 0.5, 4, 0.9, 0.1, 2**62, (1, 2))
FULL_SPEC = SamplingSpec(
    max_tokens=9,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    no_repeat_ngram_size=3,
    bad_words=((1, 2), (3,)),
    logit_bias=((4, -100.0), (5, 1.5)),
    embedding_bias=bytes(8),
    top_p_decay=0.9,
    top_p_min=0.1,
    top_p_reset_ids=7,
    num_logprobs=0,
    num_prompt_logprobs=3,
    wants_context_logits=True,
    wants_generation_logits=True,
    logits_processors=("a", "b"),
    uses_batched_processor=True,
)
REQUEST = GenerateRequest(
    "a", [1, 2, 3], SPEC, 2.5, 7, "salt", Retention((RetentionRange(0, None, 3, 1.5), RetentionRange(1, 2, 3)), 50, 2.0)
)

TICKET = Ticket(
    "ticket",
    KvSource("g", (KvEndpoint("h", 1, 0, 2), KvEndpoint("h", 2, 2, 1)), {"dtype": "float32"}, "secret"),
)


def over_the_wire(fields: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(fields))


def test_messages_survive() -> None:
    assert GenerateRequest.from_wire(over_the_wire(REQUEST.to_wire())) == REQUEST
    first = replace(REQUEST, offer="ticket", grace_s=2.5)
    assert GenerateRequest.from_wire(over_the_wire(first.to_wire())) == first
    second = replace(REQUEST, fetch=TICKET)
    assert GenerateRequest.from_wire(over_the_wire(second.to_wire())) == second
    third = replace(REQUEST, num_replayed=2, answer_every=16)
    assert GenerateRequest.from_wire(over_the_wire(third.to_wire())) == third
    chunk = TokenChunk("a", [5, 6], "stop", 6, 3)
    assert TokenChunk.from_wire(over_the_wire(chunk.to_wire())) == chunk
    info = ModelInfo("m", 10, 20, "float32", 32, 8, (2, 3))
    assert ModelInfo.from_wire(over_the_wire(info.to_wire())) == info


def test_all_of_sampling_survives_and_defaults_cost_nothing() -> None:
    assert SamplingSpec.from_wire(over_the_wire(FULL_SPEC.to_wire())) == FULL_SPEC
    assert SamplingSpec(9).to_wire() == {"max_tokens": 9}


def test_extras_of_tokens_survive() -> None:
    own, other = Logprob(5, -0.25, 1), Logprob(8, -1.5, 2)
    chunk = TokenChunk("a", [5], None, None, 3, None, 2, [(own, own, other)], [(other,), (own,)], bytes(4), bytes(8))
    assert TokenChunk.from_wire(over_the_wire(chunk.to_wire())) == chunk
    rows_alone = TokenChunk("a", context_logits=bytes(16))
    assert TokenChunk.from_wire(over_the_wire(rows_alone.to_wire())).context_logits == bytes(16)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1, "from_the_future": 2},
        {"max_tokens": "1"},
        {"max_tokens": 1, "bad_words": [1]},
        {"max_tokens": 1, "logit_bias": [[1, 2, 3]]},
        {"max_tokens": 1, "num_logprobs": 1.5},
        {"max_tokens": 1, "wants_context_logits": 1},
        {"max_tokens": 1, "logits_processors": "ab"},
    ],
)
def test_a_wrong_sampling_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        SamplingSpec.from_wire(fields)


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_tokens_survive(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens


def test_errors_keep_their_kind() -> None:
    error = TokenChunk.from_wire(
        over_the_wire(TokenChunk("a", error=Overloaded("full", retry_after_s=2)).to_wire())
    ).error
    assert isinstance(error, Overloaded)
    assert (error.message, error.retry_after_s, error.http_status) == ("full", 2.0, 429)
    rejected = error_from_wire(RequestRejected("bad", param="top_p").to_wire())
    assert isinstance(rejected, ValueError)
    assert rejected.param == "top_p"
    assert type(error_from_wire({"code": "from the future", "message": "m"})) is TensorweaveError


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(junk)
@example(["", 0, None])
@example([[], 0, None])
def test_malformed_messages_are_refused(fields: Any) -> None:
    """Unless it is no junk, but what such a message looks like."""
    for message in (GenerateRequest, SamplingSpec, TokenChunk, ModelInfo, Retention):
        try:
            read = message.from_wire(fields)  # type: ignore[attr-defined]
        except WireError:
            continue
        assert read.to_wire() == fields


@given(st.integers(0, 10), junk)
def test_a_wrong_field_is_refused(at: int, value: Any) -> None:
    fields = REQUEST.to_wire()
    fields[at] = value
    try:
        request = GenerateRequest.from_wire(fields)
    except WireError:
        return
    assert isinstance(request.request_id, str)
    assert isinstance(request.deadline_s, float | int | None)
    assert type(request.priority) is int
    assert isinstance(request.cache_salt, str | None)
    assert type(request.num_replayed) is int


def test_opaque_state_survives() -> None:
    state = OpaqueState(TICKET, seed=2**62)
    assert OpaqueState.unpack(state.pack()) == state


@given(st.binary(max_size=200))
@example(b"\xff" * 30)
@example(msgpack.packb([2, TICKET.to_wire(), 0]))
@example(msgpack.packb([1, ["t"], 0]))
@example(bytes(1 << 17))
def test_other_bytes_are_no_opaque_state(data: bytes) -> None:
    with pytest.raises(ValueError, match="opaque_state"):
        OpaqueState.unpack(data)
