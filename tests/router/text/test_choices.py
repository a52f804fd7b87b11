"""Text, tokens and offsets of an answer agree, for all tokenizers, prompts and forms of the answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.router.text.pieces import REPLACEMENT
from tensorweave.router.text.token_offsets import TokenOffsets
from tensorweave.router.text.tokens import Tokenizer
from tests.router.calls import COMPLETIONS, post
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import completion, events_of, model_info
from tests.router.small_tokenizers import (
    byte_fallback,
    byte_level,
    llama2,
    metaspace,
    slow_byte_level,
    slow_llama2,
    word_piece,
)

TOKENIZERS = [byte_level, slow_byte_level, byte_fallback, llama2, slow_llama2, metaspace, word_piece]
NUM_UNKNOWN = 3  # ids of the model's that the tokenizer lacks
TEXTS = ["the capital", "a b.c", "é日本", " x", "😀", "the  the", "▁a", "A b"]


@dataclass(frozen=True)
class Case:
    """A prompt, an answer, and how it is asked for."""

    which: Callable[[], Tokenizer]
    prompt: str | list[int]
    answer: list[int]
    fields: dict[str, Any]
    tokens_per_step: int
    fault_after: int | None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.which()

    def is_text(self, prompt_ids: list[int]) -> bool:
        """The prompt was given as text, and is not cut."""
        if not isinstance(self.prompt, str):
            return False
        return len(prompt_ids) == len(
            self.tokenizer.encode(self.prompt, add_special_tokens=self.fields["add_special_tokens"])
        )

    def link(self, gang_id: str, faults: list[Fault]) -> FakeLink:
        info = model_info(vocab_size=self.tokenizer.vocab_size + NUM_UNKNOWN)
        return FakeLink(info, gang_id=gang_id, script=self.answer, tokens_per_step=self.tokens_per_step, faults=faults)

    def ask(self, **more: Any) -> Any:
        faults = [] if self.fault_after is None else [Fault("error", self.fault_after)]
        links = [self.link("gang-0", faults), self.link("gang-1", [])]
        body = completion(self.prompt, logprobs=2, return_token_ids=True, **self.fields, **more)
        answer = post(COMPLETIONS, body, *links, tokenizer=self.tokenizer)
        assert answer.status_code == 200, answer.text
        return answer

    def whole(self) -> dict[str, Any]:
        choice: dict[str, Any] = self.ask().json()["choices"][0]
        return choice

    def streamed(self) -> list[dict[str, Any]]:
        return [event["choices"][0] for event in events_of(self.ask(stream=True).text)[:-1]]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of all kinds, among them whole texts, so that characters in parts are often completed."""
    one = st.integers(0, tokenizer.vocab_size - 1 + NUM_UNKNOWN).map(lambda token_id: [token_id])
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    chunks = st.lists(st.one_of(one, st.sampled_from([ids for ids in encoded if ids])), min_size=1, max_size=6)
    return chunks.map(lambda lists: [token_id for ids in lists for token_id in ids])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    which = draw(st.sampled_from(TOKENIZERS))
    tokenizer = which()
    prompt: str | list[int] = draw(
        st.one_of(ids_of(tokenizer), st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(" ".join))
    )
    answer = draw(ids_of(tokenizer))
    if isinstance(prompt, list) and draw(st.booleans()):  # cut anywhere, within a character too
        ids = [*prompt, *answer]
        cut = draw(st.integers(1, len(ids) - 1))
        prompt, answer = ids[:cut], ids[cut:]
    fields: dict[str, Any] = {
        "echo": draw(st.booleans()),
        "skip_special_tokens": draw(st.booleans()),
        "add_special_tokens": draw(st.booleans()),
        "include_stop_str_in_output": draw(st.booleans()),
        "max_tokens": len(answer),
        "ignore_eos": True,
    }
    if draw(st.booleans()):
        fields["stop"] = draw(st.lists(st.sampled_from(["a", "b.", " the", "日", "本", REPLACEMENT]), max_size=2))
    if draw(st.booleans()):
        fields["truncate_prompt_tokens"] = draw(st.integers(1, 6))
    if draw(st.booleans()):
        fields["stop_token_ids"] = [draw(st.sampled_from(answer))]
    fault_after = draw(st.none() | st.integers(0, 3))
    return Case(which, prompt, answer, fields, draw(st.integers(1, 3)), fault_after)


def part_of(written: str) -> bytes:
    """What one of `logprobs.tokens` stands for."""
    if not written.startswith("bytes:"):
        return written.encode()
    return re.sub(r"\\x(..)", lambda match: chr(int(match[1], 16)), written.removeprefix("bytes:")).encode("latin-1")


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_text_tokens_and_offsets_agree(case: Case) -> None:
    choice, fields = case.whole(), case.fields
    text, told = choice["text"], choice["logprobs"]
    offsets, tokens = told["text_offset"], told["tokens"]
    answer_ids = choice["token_ids"]
    prompt_ids = choice["prompt_token_ids"] if fields["echo"] else []
    ids = [*prompt_ids, *answer_ids]
    assert len(ids) == len(tokens) == len(offsets)
    assert answer_ids == case.answer[: len(answer_ids)]
    is_cut = choice["finish_reason"] == "stop" and not isinstance(choice["stop_reason"], int)
    ends_with_stop_token = isinstance(choice["stop_reason"], int) and not fields["include_stop_str_in_output"]

    # Each token is at its place, or has none.
    assert offsets == sorted(offsets)
    assert not offsets or offsets[-1] <= len(text)
    is_text = case.is_text(choice["prompt_token_ids"])
    hidden = hidden_places(case, prompt_ids, ids, is_text=is_text)
    if ends_with_stop_token:
        hidden.add(len(ids) - 1)
    ends = [*offsets[1:], len(text)]
    for place, (start, end, written) in enumerate(zip(offsets, ends, tokens, strict=True)):
        if place in hidden:
            assert start == end or REPLACEMENT in text or is_inside(tokens, place)
        elif not written.startswith("bytes:") and not is_cut:
            assert text[start : start + len(written)] == written
            assert end == start + len(written) or tokens[place + 1 : place + 2] == [""] or REPLACEMENT in text
    # Together they are the text.
    joined = b"".join([part_of(written) for place, written in enumerate(tokens) if place not in hidden])
    if REPLACEMENT not in (*text, choice["stop_reason"]):
        # What the prompt has of a character that the answer completes is told with the answer.
        head = (
            0 if prompt_ids or is_whole(joined) else next(n for n in (1, 2, 3) if is_whole(text.encode()[:n] + joined))
        )
        joined = text.encode()[:head] + joined
        assert joined.startswith(text.encode()) if is_cut else joined.decode() == text
    # A token that was chosen has the same name among the likeliest.
    assert all(top is None or written in top for written, top in zip(tokens, told["top_logprobs"], strict=True))

    check_decode(case, choice, prompt_ids, is_cut=is_cut, ends_with_stop_token=ends_with_stop_token, is_text=is_text)
    check_stream(case, choice)


def hidden_places(case: Case, prompt_ids: list[int], ids: list[int], *, is_text: bool) -> set[int]:
    """Special tokens that are skipped in the answer, and those put around a text."""
    special = case.tokenizer.special_ids
    first_told = len(prompt_ids) if case.fields["skip_special_tokens"] else len(ids)
    hidden = {place for place in range(first_told, len(ids)) if ids[place] in special}
    if is_text and prompt_ids and case.fields["add_special_tokens"]:
        before, behind = case.tokenizer.num_added_tokens
        hidden |= {*range(before), *range(len(prompt_ids) - behind, len(prompt_ids))}
    return hidden


def is_whole(raw: bytes) -> bool:
    return REPLACEMENT not in raw.decode(errors="replace")


def is_inside(tokens: list[str], place: int) -> bool:
    """Between the parts of a character."""
    return any(written.startswith("bytes:") for written in tokens[max(place - 8, 0) : place])


def check_decode(
    case: Case, choice: dict[str, Any], echoed: list[int], *, is_cut: bool, ends_with_stop_token: bool, is_text: bool
) -> None:
    """Prompt and answer read as the tokenizer decodes both at once, but for what malformed bytes make of others."""
    if is_cut:
        return
    tokenizer, skips = case.tokenizer, case.fields["skip_special_tokens"]
    answer = choice["token_ids"][:-1] if ends_with_stop_token else choice["token_ids"]
    if skips:
        answer = [token_id for token_id in answer if token_id not in tokenizer.special_ids]
    if echoed:
        before, behind = tokenizer.num_added_tokens if is_text and case.fields["add_special_tokens"] else (0, 0)
        shown = echoed[before : len(echoed) - behind]
        whole, prompt = tokenizer.decode([*shown, *answer], skip_special_tokens=False), ""
    else:
        prompt_ids = choice["prompt_token_ids"]
        whole = tokenizer.decode([*prompt_ids, *answer], skip_special_tokens=skips)
        prompt = tokenizer.decode(prompt_ids, skip_special_tokens=skips)
    if REPLACEMENT in prompt + whole and case.which is not byte_level:
        return
    if not prompt.endswith(REPLACEMENT):
        assert prompt + choice["text"] == whole


def check_stream(case: Case, choice: dict[str, Any]) -> None:
    parts = case.streamed()
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name, told in choice["logprobs"].items():
        assert [item for part in parts for item in part["logprobs"][name]] == told
    num_chars = 0
    for part in parts:  # no token before its text
        num_chars += len(part["text"])
        assert all(offset <= num_chars for offset in part["logprobs"]["text_offset"])


# ---- malformed bytes


def characters_of(raw: bytes) -> list[int]:
    """Of each byte, the number of the character that it is part of; one U+FFFD for each malformed part."""
    numbers: list[int] = []
    number = place = 0
    while place < len(raw):
        try:
            size = len(raw[place:].decode()[0].encode())
        except UnicodeDecodeError as error:
            size = len(raw[place:].decode(errors="ignore")[:1].encode()) if error.start else error.end
        numbers += [number] * size
        number += 1
        place += size
    return numbers


@settings(max_examples=200, deadline=None)
@given(ids=ids_of(byte_level()))
def test_a_token_is_at_the_character_of_its_first_byte(ids: list[int]) -> None:
    tokenizer = byte_level()
    track = TokenOffsets(tokenizer, tokenizer.assembler(skip_special_tokens=False), 0)
    text = track.add(ids) + track.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    parts = [tokenizer.token_bytes(token_id) for token_id in ids]
    numbers = characters_of(b"".join(parts))
    first = 0
    for told, part in zip(track.end(len(text)), parts, strict=True):
        if part:
            assert told.offset == numbers[first]
        first += len(part)


def byte_id(byte: int) -> int:
    token_id: int = byte_fallback().backend.convert_tokens_to_ids(f"<0x{byte:02X}>")
    return token_id


@pytest.mark.parametrize("which", [byte_fallback, slow_llama2])
def test_each_byte_of_a_malformed_run_is_at_its_own_replacement(which: Callable[[], Tokenizer]) -> None:
    """Three bytes of four, then other text: until then, they might have been one character."""
    tokenizer = which()
    [word] = tokenizer.encode("b", add_special_tokens=False)[-1:]
    ids = [word, *map(byte_id, "😀".encode()[:3]), word, *map(byte_id, "日".encode()), word]
    track = TokenOffsets(tokenizer, tokenizer.assembler(), 0, tokenizer.special_ids)
    assert track.add(ids) == f"b{REPLACEMENT * 3}b日b"
    told = track.end(100)
    assert [token.offset for token in told] == [0, 1, 2, 3, 4, 5, 5, 5, 6]
    assert [token.own for token in told] == ["b", b"\xf0", b"\x9f", b"\x98", "b", b"\xe6", b"\x97", b"\xa5", "b"]
