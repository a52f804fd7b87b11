"""The pieces that an incremental detokenizer returns are the whole text, cut anywhere but inside a character."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.router.text.detokenize import IncrementalDetokenizer, StopStrings
from tensorweave.router.text.pieces import REPLACEMENT, ByteFallbackPieces, ByteLevelPieces
from tensorweave.router.text.tokens import Tokenizer
from tests.router.small_tokenizers import byte_fallback, byte_level, metaspace


def pieces_of(tokenizer: Tokenizer, ids: list[int], cuts: list[int], *, skip: bool = True) -> list[str]:
    """Push `ids` in chunks of the sizes `cuts`, repeated."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    out, sizes, rest = [], itertools.cycle(cuts), ids
    while rest:
        size = next(sizes)
        out.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    return [*out, detokenizer.flush()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60)


CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(ids=ids_of(byte_level()), cuts=CUTS, skip=st.booleans())
def test_byte_level_pieces_are_the_decoded_text(ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    whole = tokenizer.backend.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert (
        "".join(pieces_of(tokenizer, ids, cuts, skip=skip)) == whole == tokenizer.decode(ids, skip_special_tokens=skip)
    )


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), cuts=CUTS)
def test_real_text_comes_back_character_by_character(text: str, cuts: list[int]) -> None:
    pieces = pieces_of(byte_level(), byte_level().encode(text), cuts)
    assert "".join(pieces) == text
    assert all(REPLACEMENT not in piece for piece in pieces) or REPLACEMENT in text


def byte_id(byte: int) -> int:
    found = byte_fallback().backend.convert_tokens_to_ids(f"<0x{byte:02X}>")
    assert isinstance(found, int)
    return found


TEXT_TOKEN = st.integers(259, 259 + 12).map(lambda token: [token])
ANY_TOKEN = st.sampled_from([[0], [1], [2]])
WHOLE_CHARACTERS = st.text(min_size=1, max_size=4).map(lambda text: [byte_id(b) for b in text.encode()])
MALFORMED = st.lists(st.integers(0x80, 0xBF), min_size=1, max_size=4).map(lambda run: [byte_id(b) for b in run])
CUT_SHORT = st.sampled_from("é日😀").map(lambda char: [byte_id(b) for b in char.encode()[:-1]])


@settings(max_examples=300, deadline=None)
@given(
    runs=st.lists(st.tuples(st.one_of(WHOLE_CHARACTERS, MALFORMED, CUT_SHORT, ANY_TOKEN), TEXT_TOKEN), max_size=12),
    cuts=CUTS,
    skip=st.booleans(),
)
def test_byte_fallback_pieces_are_the_decoded_text(
    runs: list[tuple[list[int], list[int]]], cuts: list[int], skip: bool
) -> None:
    tokenizer = byte_fallback()
    ids = [token for run, text in runs for token in [*run, *text]]
    whole = tokenizer.backend.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokenizer, ids, cuts, skip=skip)) == whole


@settings(max_examples=200, deadline=None)
@given(ids=ids_of(byte_fallback()), cuts=CUTS)
def test_byte_fallback_text_does_not_depend_on_the_cuts(ids: list[int], cuts: list[int]) -> None:
    assert "".join(pieces_of(byte_fallback(), ids, cuts)) == "".join(pieces_of(byte_fallback(), ids, [len(ids) or 1]))


def test_byte_fallback_keeps_whole_characters_before_a_malformed_byte() -> None:
    run = [byte_id(b) for b in "日".encode()] + [byte_id(0xFF), byte_id(0x41)]
    assert pieces_of(byte_fallback(), run, [1]) == ["", "", "日", REPLACEMENT, REPLACEMENT, ""]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 10), max_size=40), cuts=CUTS, skip=st.booleans())
def test_other_decoders_go_through_a_window(ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = metaspace()
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(tokenizer, ids, cuts, skip=skip)) == whole


def test_the_fast_tables_are_used() -> None:
    assert isinstance(byte_level().pieces(spaces_between_special_tokens=True), ByteLevelPieces)
    assert isinstance(byte_fallback().pieces(spaces_between_special_tokens=True), ByteFallbackPieces)


def test_cost_of_a_token_does_not_grow_with_the_text() -> None:
    detokenizer = IncrementalDetokenizer(byte_level(), stop=["never to be seen"])
    ids = [3 + i % 300 for i in range(1000)]
    times_s = []
    for _ in range(100):
        started_s = time.thread_time()  # other processes' turns do not count
        for token in ids:
            detokenizer.push([token])
        times_s.append(time.thread_time() - started_s)
    assert min(times_s[50:]) < 3 * min(times_s[:50])


# ---- stop strings


def reference_stop(text: str, stops: list[str], *, included: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, the longest of those."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return (text[:end] if included else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab日.", max_size=40),
    stops=st.lists(st.text("ab日.", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    included=st.booleans(),
)
def test_stop_strings_across_any_borders(text: str, stops: list[str], cuts: list[int], included: bool) -> None:
    watcher = StopStrings(stops, is_included=included)
    out, sizes, rest = "", itertools.cycle(cuts), text
    expected, reason = reference_stop(text, stops, included=included)
    while rest:
        size = next(sizes)
        out += watcher.push(rest[:size])
        rest = rest[size:]
        assert expected.startswith(out), "released text that had to be held back"
    assert (out + watcher.flush(), watcher.found) == (expected, reason)


def test_held_text_is_the_least_possible() -> None:
    watcher = StopStrings(["END"], is_included=False)
    assert [watcher.push(piece) for piece in ["fooE", "N", "x", "EEN", "D tail"]] == ["foo", "", "ENx", "E", ""]
    assert watcher.found == "END"


def test_stop_token_is_left_out_unless_asked_for() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("Paris.")
    without = IncrementalDetokenizer(tokenizer)
    assert without.push(ids, ends_with_stop_token=True) + without.flush() == tokenizer.decode(ids[:-1])
    with_it = IncrementalDetokenizer(tokenizer, include_stop_str_in_output=True)
    assert with_it.push(ids, ends_with_stop_token=True) + with_it.flush() == "Paris."


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, "a"), (3, "a.b"), (9, "a.b.c")])
def test_stop_strings_wait_for_min_tokens(min_tokens: int, expected: str) -> None:
    tokenizer = byte_level()
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["."], min_tokens=min_tokens)
    text = "".join(detokenizer.push([token]) for char in "a.b.c" for token in tokenizer.encode(char))
    assert text + detokenizer.flush() == expected
