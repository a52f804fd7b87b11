"""`Tokenizer` agrees with transformers, whose objects it never changes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.text import tokens
from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.tokens import Tokenizer
from tests.router.small_tokenizers import byte_fallback, byte_level, llama2, metaspace

USER = [{"role": "user", "content": "Hi"}]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=50), special=st.booleans())
def test_encode_agrees_with_transformers(text: str, special: bool) -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer.backend(text, add_special_tokens=special)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=special) == ids
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=True)


def test_truncation_keeps_the_end() -> None:
    ids = byte_level().encode("The capital of France")
    assert byte_level().encode("The capital of France", truncate=3) == ids[-3:]


def test_chat_agrees_with_transformers() -> None:
    tokenizer = byte_level()
    expected = tokenizer.backend.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(ChatPrompt(USER)) == expected
    assert (
        tokenizer.chat(ChatPrompt(USER, adds_generation_prompt=False))
        == expected[: -len(tokenizer.encode("<|im_start|>assistant\n"))]
    )


def test_chats_that_the_template_refuses() -> None:
    late_system = [*USER, {"role": "system", "content": "x"}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    for messages in (late_system, image):
        with pytest.raises(RequestRejected) as refused:
            byte_level().chat(ChatPrompt(messages))
        assert refused.value.param == "messages"
    with pytest.raises(RequestRejected, match="no chat template"):
        byte_fallback().chat(ChatPrompt(USER))
    with pytest.raises(RequestRejected, match="tokenize"):
        byte_level().chat(ChatPrompt(USER, arguments={"tokenize": True}))


def test_ids_and_texts() -> None:
    tokenizer = byte_level()
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 0, len(tokenizer.backend))
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"
    assert tokenizer.decode([2, *tokenizer.encode("a")]) == "a"


def test_a_word_within_a_text_and_behind_a_space() -> None:
    """A tokenizer that puts a space before each text does not hide the word without one."""
    for tokenizer, within, behind in (
        (llama2(), ["b", "c"], ["▁", "b", "c"]),
        (byte_level(), ["b", "c"], ["Ġb", "c"]),
    ):
        assert [tokenizer.token_names(ids) for ids in tokenizer.word_ids("bc")] == [within, behind]
    assert metaspace().word_ids("the") == [metaspace().encode("the", add_special_tokens=False)]


def test_loading_from_a_directory_an_instance_and_itself(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.backend.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("Grüße 東京") == tokenizer.encode("Grüße 東京")
    assert loaded.chat(ChatPrompt(USER)) == tokenizer.chat(ChatPrompt(USER))
    assert Tokenizer.load(str(tmp_path), tokenizer_mode="slow").encode("a b") == tokenizer.encode("a b")
    assert Tokenizer.load(tokenizer) is tokenizer
    assert Tokenizer.load(tokenizer.backend).encode("x") == tokenizer.encode("x")


def test_a_caller_who_truncates_elsewhere_harms_nothing() -> None:
    tokenizer = byte_level()
    tokenizer.backend("some longer text", truncation=True, max_length=2)
    assert len(tokenizer.encode("some longer text")) > 2


def test_long_texts_have_the_tokens_of_short_ones() -> None:
    tokenizer, part = byte_level(), "Grüße aus 東京 😀! "
    assert tokenizer.encode(part * 1000) == tokenizer.encode(part) * 1000


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
def test_it_can_be_sent_to_a_worker_process(tokenizer: Tokenizer) -> None:
    text, copy = "Grüße aus 東京 😀!", pickle.loads(pickle.dumps(tokenizer))
    ids = tokenizer.encode(text)
    assert copy.encode(text) == ids
    assert copy.decode(ids) == tokenizer.decode(ids)
    assert copy.special_ids == tokenizer.special_ids


def test_what_took_long_to_find_out_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process that did it again would take 0.2 s for each first body, and lose its priority for that."""
    tokenizer = byte_level()
    first = tokenizer.max_chars_per_token, tokenizer.written_of_tools
    copy = pickle.loads(pickle.dumps(tokenizer))
    monkeypatch.setattr(tokens, "max_chars_per_token", None)
    monkeypatch.setattr(tokens, "written_of_tools", None)
    assert (copy.max_chars_per_token, copy.written_of_tools) == first
