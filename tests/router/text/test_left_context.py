"""An answer continues its prompt: tokenizers that drop a text's first space keep that of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tensorweave.router.text.tokens import Tokenizer
from tests.router.calls import CHAT, COMPLETIONS, post
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import chat, completion, events_of, model_info
from tests.router.small_tokenizers import byte_level, llama2, metaspace, slow_byte_level, slow_llama2, word_piece

BOTH = pytest.mark.parametrize("which", [llama2, slow_llama2])
THE_CAPITAL = ["▁the", "▁cap", "ital"]


def ids_of(*pieces: str) -> list[int]:
    found: list[int] = llama2().backend.convert_tokens_to_ids(list(pieces))
    return found


def link(*pieces: str, **options: Any) -> FakeLink:
    return FakeLink(model_info(vocab_size=llama2().vocab_size + 3), script=ids_of(*pieces), **options)


def choices_of(tokenizer: Tokenizer, body: dict[str, Any], *links: FakeLink, path: str = COMPLETIONS) -> list[Any]:
    answer = post(path, body, *links, tokenizer=tokenizer)
    assert answer.status_code == 200, answer.text
    choices: list[Any] = answer.json()["choices"]
    return choices


@BOTH
@pytest.mark.parametrize("skips", [True, False])
def test_a_completion_keeps_its_leading_space(which: Callable[[], Tokenizer], skips: bool) -> None:
    fields = {"max_tokens": 3, "logprobs": 0, "skip_special_tokens": skips}
    [choice] = choices_of(which(), completion("the b", **fields), link(*THE_CAPITAL))
    assert choice["text"] == " the capital"
    assert choice["logprobs"]["tokens"] == [" the", " cap", "ital"]
    assert choice["logprobs"]["text_offset"] == [0, 4, 8]
    [choice] = choices_of(which(), completion("b", echo=True, **fields), link(*THE_CAPITAL))
    assert choice["text"] == "b the capital"
    assert choice["logprobs"]["tokens"] == ["<s>", "", "b", " the", " cap", "ital"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 0, 1, 5, 9]


@BOTH
def test_every_sequence_and_every_stream_keeps_it(which: Callable[[], Tokenizer]) -> None:
    told = choices_of(which(), completion(["b", "the"], n=3, max_tokens=3), link(*THE_CAPITAL))
    assert [choice["text"] for choice in told] == [" the capital"] * 6
    streamed = post(COMPLETIONS, completion("b", max_tokens=3, stream=True), link(*THE_CAPITAL), tokenizer=which())
    assert [event["choices"][0]["text"] for event in events_of(streamed.text)[:-1]] == [" the", " cap", "ital"]


@BOTH
def test_a_chat_answer_behind_a_special_token(which: Callable[[], Tokenizer]) -> None:
    """The prompt ends with <|assistant|>, which leaves no text; the message before it does."""
    [choice] = choices_of(which(), chat("b", max_tokens=3, logprobs=True), link(*THE_CAPITAL), path=CHAT)
    assert choice["message"]["content"] == " the capital"
    content = choice["logprobs"]["content"]
    assert [token["token"] for token in content] == [" the", " cap", "ital"]
    assert b"".join(bytes(token["bytes"]) for token in content) == b" the capital"


@BOTH
def test_the_first_text_of_all_begins_without_a_space(which: Callable[[], Tokenizer]) -> None:
    """Behind nothing but special tokens, as the tokenizer decodes it: so do those that were likely."""
    begins = ids_of("<s>")
    [choice] = choices_of(which(), completion(begins, max_tokens=3, logprobs=2), link(*THE_CAPITAL))
    assert choice["text"] == "the capital" == which().decode([*begins, *ids_of(*THE_CAPITAL)])
    assert choice["logprobs"]["tokens"] == ["the", " cap", "ital"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7]
    assert all(not name.startswith(" ") for name in choice["logprobs"]["top_logprobs"][0])
    shown = completion(begins, max_tokens=3, logprobs=0, skip_special_tokens=False)
    assert choices_of(which(), shown, link(*THE_CAPITAL))[0]["text"] == " the capital"


@BOTH
def test_a_lost_gang_changes_no_space(which: Callable[[], Tokenizer]) -> None:
    links = [link(*THE_CAPITAL, faults=[Fault("error", after)], gang_id=f"gang-{after}") for after in (1, 2)]
    body = completion("b", max_tokens=3, echo=True, logprobs=0)
    [choice] = choices_of(which(), body, *links, link(*THE_CAPITAL, gang_id="gang-3"))
    assert choice["text"] == "b the capital"


@BOTH
def test_a_generation_phase_goes_on_from_the_prompt(which: Callable[[], Tokenizer]) -> None:
    phase = {"request_type": "context_only"}
    gang = link(*THE_CAPITAL, gives_kv=True)
    answer = post(COMPLETIONS, completion("b", max_tokens=3, disaggregated_params=phase), gang, tokenizer=which())
    assert answer.status_code == 200, answer.text
    [first] = answer.json()["choices"]
    assert first["text"] == " the"
    phase = {**first["disaggregated_params"], "request_type": "generation_only"}
    body = completion(answer.json()["prompt_token_ids"], max_tokens=3, logprobs=0, disaggregated_params=phase)
    [choice] = choices_of(which(), body, gang)
    assert choice["text"] == " the capital"
    assert choice["logprobs"]["tokens"] == [" the", " cap", "ital"]


def test_other_decoders_that_know_a_first_token() -> None:
    paris, the = metaspace().backend.convert_tokens_to_ids(["▁Paris", "▁the"])
    word, part = word_piece().backend.convert_tokens_to_ids(["cap", "##ital"])
    for tokenizer, script, text in (
        (metaspace(), [paris, the], " Paris the"),
        (word_piece(), [part, word], "ital cap"),
    ):
        gang = FakeLink(model_info(vocab_size=tokenizer.vocab_size), script=script)
        body = completion([script[1]], max_tokens=2, logprobs=0)
        [choice] = choices_of(tokenizer, body, gang)
        assert choice["text"] == text == "".join(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["text_offset"] == [0, len(choice["logprobs"]["tokens"][0])]


@pytest.mark.parametrize("which", [byte_level, slow_byte_level, llama2, slow_llama2])
def test_a_character_that_the_prompt_begins_is_told_with_the_answer(which: Callable[[], Tokenizer]) -> None:
    tokenizer = which()
    before = tokenizer.encode("b", add_special_tokens=False)
    parts = tokenizer.encode("b😺", add_special_tokens=False)[len(before) :]
    assert len(parts) > 1
    info = model_info(vocab_size=tokenizer.vocab_size)
    for cut in range(1, len(parts)):
        prompt, script = [*before, *parts[:cut]], parts[cut:]
        for echo in (False, True):
            body = completion(prompt, echo=echo, logprobs=0, max_tokens=len(script))
            [choice] = choices_of(tokenizer, body, FakeLink(info, script=script))
            assert choice["text"] == ("b😺" if echo else "😺")
            told = len(parts) if echo else len(script)
            assert choice["logprobs"]["text_offset"][-told:] == [len(choice["text"]) - 1] * told
    [choice] = choices_of(tokenizer, completion(parts[:1], echo=True, max_tokens=0), FakeLink(info))
    assert choice["text"] == "\ufffd"


# ---- echoed prompts


def test_an_echo_of_token_ids_shows_its_special_tokens() -> None:
    """As lm-eval asks for."""
    ids = [0, 0, 0, *byte_level().encode("a b")]
    for fields in ({}, {"skip_special_tokens": True}, {"skip_special_tokens": False}):
        body = completion(ids, echo=True, logprobs=0, max_tokens=1, **fields)
        [choice] = choices_of(byte_level(), body, FakeLink(model_info(), script=byte_level().encode("c")))
        assert choice["text"] == "<|endoftext|><|endoftext|><|endoftext|>a bc" == "".join(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["text_offset"][:4] == [0, 13, 26, 39]
        bare = {name: value for name, value in body.items() if name != "logprobs"}
        again = choices_of(byte_level(), bare, FakeLink(model_info(), script=byte_level().encode("c")))
        assert again[0]["text"] == choice["text"]


@BOTH
def test_tokens_put_around_a_text_have_no_part_in_it(which: Callable[[], Tokenizer]) -> None:
    prompt = "<s> b</s> the"
    body = completion(prompt, echo=True, logprobs=0, max_tokens=0)
    [choice] = choices_of(which(), body, link())
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert (offsets[:2], tokens[:2]) == ([0, 0], ["<s>", "<s>"])
    assert "".join(tokens[1:]) == choice["text"]
    assert [choice["text"][start:][: len(token)] for start, token in zip(offsets, tokens, strict=True)] == tokens


def test_a_text_that_its_tokens_do_not_read_as() -> None:
    """A tokenizer that lower-cases: the text came as it came, but the tokens that are told are those of another."""
    tokenizer, prompt = word_piece(), "The capitals of France."
    gang = FakeLink(model_info(vocab_size=tokenizer.vocab_size))
    body = completion(prompt, echo=True, max_tokens=0)
    assert choices_of(tokenizer, body, gang)[0]["text"] == prompt
    [choice] = choices_of(tokenizer, {**body, "logprobs": 0}, gang)
    tokens = choice["logprobs"]["tokens"]
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert choice["text"] == "".join(tokens[1:-1]) == "the capitals of france."
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 7, 11, 12, 15, 22, 23]


def test_ids_that_only_the_model_has_leave_nothing() -> None:
    unknown = byte_level().vocab_size + 1
    for which in (byte_level(), Tokenizer(byte_level().backend, uses_rust=False)):
        info = model_info(vocab_size=byte_level().vocab_size + 3)
        [a] = byte_level().encode("a")
        body = completion([a, unknown, a], echo=True, logprobs=0, max_tokens=2)
        [choice] = choices_of(which, body, FakeLink(info, script=[unknown, a]))
        assert (choice["text"], choice["logprobs"]["tokens"]) == ("aaa", ["a", "", "a", "", "a"])
        assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2]
