"""Log-probabilities, echoes and token ids in answers: OpenAI's shapes, each token once and in step with the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.router.openai.schemas import ChatChunk, ChatCompletion, Completion, CompletionChunk
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.text.choices import ChoiceStream, Prompt, Telling
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.generation import TextDelta
from tensorweave.router.text.tokens import Tokenizer
from tests.router.calls import CHAT, COMPLETIONS, TEXT, post, scripted
from tests.router.fake_fleet import FakeLink
from tests.router.fake_logprobs import fake_logprobs
from tests.router.serving import IM_END, chat, completion, events_of, model_info, script_of
from tests.router.small_tokenizers import byte_fallback, byte_level, metaspace

IDS = script_of(TEXT)
SHAPES = TokenShapes(byte_level())


def own_logprob(token_id: int) -> float:
    return -(1 + token_id % 3) / 2


def completions(*links: FakeLink, **fields: Any) -> dict[str, Any]:
    answer = post(COMPLETIONS, completion(**{"max_tokens": 100, **fields}), *links)
    assert answer.status_code == 200, answer.text
    Completion.model_validate_json(answer.text, strict=True)
    body: dict[str, Any] = answer.json()
    return body


# ---- completions


def test_completion_logprobs() -> None:
    body = completions(scripted(), logprobs=2)
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
    assert len(logprobs["tokens"]) == body["usage"]["completion_tokens"] == len(IDS)
    assert logprobs["token_logprobs"] == [own_logprob(token) for token in IDS]
    for token, text, top in zip(IDS, logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[text] == own_logprob(token)
        assert len(top) == (2 if token % 3 < 2 else 3)
        assert max(top.values()) == -0.5
    offsets = logprobs["text_offset"]
    for start, end, text in zip(offsets, offsets[1:], logprobs["tokens"], strict=False):
        assert text.startswith("bytes:") or choice["text"][start:end] == text
    assert (offsets[-1], logprobs["tokens"][-1]) == (len(TEXT), "<|im_end|>")


def test_bytes_of_a_character_in_parts() -> None:
    """Tokens that are no whole character say their bytes, in both shapes, and together they are the text."""
    tokens = byte_level().encode("😺")
    assert len(tokens) > 1
    link = FakeLink(model_info(), script=[*tokens, IM_END])
    choice = completions(link, logprobs=0)["choices"][0]
    assert choice["text"] == "😺"
    told = choice["logprobs"]
    assert all(text.startswith("bytes:\\x") for text in told["tokens"][:-1])
    assert told["text_offset"] == [0] * len(tokens) + [1]
    content = post(CHAT, chat(logprobs=True), link).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content[:-1] for byte in token["bytes"]).decode() == "😺"
    assert content[0]["token"] == told["tokens"][0].removeprefix("bytes:")


@pytest.mark.parametrize("prompt", ["Grüße, 東京", [5, 6, 7]])
@pytest.mark.parametrize("max_tokens", [0, 1, 100])
def test_echo_with_logprobs(prompt: Any, max_tokens: int) -> None:
    """As lm-eval asks for: the prompt's tokens come first, the very first without a log-probability."""
    ids = byte_level().encode(prompt) if isinstance(prompt, str) else prompt
    link = scripted()
    body = completions(link, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens)
    [choice] = body["choices"]
    told = [*ids, *IDS[:max_tokens]]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, *map(own_logprob, told[1:])]
    assert logprobs["top_logprobs"][0] is None
    assert all(max(top.values()) == -0.5 for top in logprobs["top_logprobs"][1:])
    assert logprobs["tokens"] == [SHAPES.text(token, "bytes:") for token in told]
    echoed = prompt if isinstance(prompt, str) else byte_level().decode(prompt)
    answer = byte_level().decode(IDS[:max_tokens])
    assert choice["text"] == echoed + (answer if max_tokens != 1 else choice["text"][len(echoed) :])
    assert logprobs["text_offset"][len(ids) :][:1] == ([len(echoed)] if max_tokens else [])
    assert choice["finish_reason"] == ("stop" if max_tokens > 1 else "length")
    assert body["usage"]["completion_tokens"] == min(max_tokens, len(IDS))
    assert (link.requests[0].sampling.num_prompt_logprobs, link.requests[0].sampling.num_logprobs) == (1, 1)


def test_echo_alone_asks_for_no_logprobs() -> None:
    link = scripted()
    body = completions(link, prompt=["one ", "two "], echo=True, max_tokens=100)
    assert [choice["text"] for choice in body["choices"]] == ["one " + TEXT, "two " + TEXT]
    assert link.requests[0].sampling.num_prompt_logprobs is None
    assert completions(scripted(), prompt="one", echo=True, max_tokens=0)["choices"][0]["text"] == "one"
    cut = completions(scripted(), prompt="The capital of France", truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert cut["choices"][0]["text"] == byte_level().decode(byte_level().encode("The capital of France")[-2:])


def test_special_tokens_in_an_echoed_prompt_keep_their_place() -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>"
    logprobs = completions(scripted(), prompt=prompt, echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    ends = [*logprobs["text_offset"][1:], len(prompt)]
    pieces = [prompt[start:end] for start, end in zip(logprobs["text_offset"], ends, strict=True)]
    assert pieces == logprobs["tokens"]


def test_best_of_tells_the_likeliest() -> None:
    link = FakeLink(model_info())
    body = completions(link, prompt=["a", "b"], n=2, best_of=5, seed=3, max_tokens=4)
    assert len(link.requests) == 10
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 40
    for place, prompt in enumerate(("a", "b")):
        every = completions(FakeLink(model_info()), prompt=prompt, n=5, seed=3, max_tokens=4, logprobs=0)["choices"]
        ranked = sorted(every, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
        told = body["choices"][2 * place : 2 * place + 2]
        assert [choice["text"] for choice in told] == [choice["text"] for choice in ranked[:2]]


def test_prompt_logprobs_and_token_ids() -> None:
    link = scripted()
    body = completions(link, prompt=[5, 6, 7], prompt_logprobs=1, return_token_ids=True)
    [choice] = body["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6, 7], IDS)
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token, told in zip([6, 7], others, strict=True):
        own = {"logprob": own_logprob(token), "rank": 1 + token % 3, "decoded_token": SHAPES.text(token, "bytes:")}
        assert told[str(token)] == own
        assert min(entry["rank"] for entry in told.values()) == 1
    assert choice["logprobs"] is None
    answer = post(CHAT, chat(prompt_logprobs=0, return_token_ids=True), scripted())
    told = ChatCompletion.model_validate_json(answer.text, strict=True)
    assert told.choices[0].token_ids == IDS
    assert told.prompt_token_ids is not None
    assert told.prompt_logprobs is not None
    assert len(told.prompt_logprobs) == len(told.prompt_token_ids)


def test_prompt_logprobs_wait_for_the_first_text() -> None:
    tokens = byte_level().encode("😺")
    choice = completions(FakeLink(model_info(), script=[*tokens, IM_END]), prompt=[5, 6], prompt_logprobs=0)
    assert [bool(told) for told in choice["choices"][0]["prompt_logprobs"]] == [False, True]


# ---- chats


def test_chat_logprobs() -> None:
    answer = post(CHAT, chat(logprobs=True, top_logprobs=2), scripted())
    body = ChatCompletion.model_validate_json(answer.text, strict=True)
    logprobs = body.choices[0].logprobs
    assert logprobs is not None
    assert [token.logprob for token in logprobs.content] == [own_logprob(token) for token in IDS]
    assert all([top.logprob for top in token.top_logprobs] == [-0.5, -1.0] for token in logprobs.content)
    text = b"".join(bytes(token.bytes) for token in logprobs.content[:-1]).decode()
    assert text == TEXT == body.choices[0].message.content
    bare = post(CHAT, chat(logprobs=True), scripted()).json()["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in bare)


# ---- streams


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize("stop", [None, ["東京 no", "nothing"], ["京 😀"]])
def test_streamed_logprobs_are_those_of_the_whole(tokens_per_step: int, stop: Any) -> None:
    fields = {"logprobs": 1, "return_token_ids": True, "stop": stop, "max_tokens": 100, "prompt": "Grüße"}
    for echo in (False, True):
        link = scripted(tokens_per_step=tokens_per_step)
        whole = completions(link, **fields, echo=echo)["choices"][0]
        link = scripted(tokens_per_step=tokens_per_step)
        streamed = post(COMPLETIONS, completion(**fields, echo=echo, stream=True), link)
        events = events_of(streamed.text)[:-1]
        assert all(CompletionChunk.model_validate_json(json.dumps(event), strict=True) for event in events)
        choices = [event["choices"][0] for event in events]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        for name, told in whole["logprobs"].items():
            assert [item for choice in choices for item in choice["logprobs"][name]] == told
        assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
        assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        assert not any("prompt_token_ids" in choice for choice in choices[1:])


@pytest.mark.parametrize("stop", [None, ["東京 no"], ["京 😀"]])
def test_streamed_chat_logprobs_keep_step_with_the_text(stop: Any) -> None:
    """Each chunk's tokens are its text, byte for byte, but for what a stop string cuts off."""
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "stop": stop}
    whole = post(CHAT, chat(**fields), scripted()).json()["choices"][0]
    events = events_of(post(CHAT, chat(**fields, stream=True), scripted()).text)[:-1]
    assert all(ChatChunk.model_validate_json(json.dumps(event), strict=True) for event in events)
    assert events[0]["prompt_token_ids"]
    choices = [event["choices"][0] for event in events]
    content = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert content == whole["logprobs"]["content"]
    assert [token for choice in choices for token in choice.get("token_ids", ())] == whole["token_ids"]
    ahead = behind = b""
    for choice in choices:
        behind += choice["delta"].get("content", "").encode()
        told = choice["logprobs"]["content"] if choice["logprobs"] else ()
        ahead += b"".join(bytes(token["bytes"]) for token in told)
        assert choice["finish_reason"] or behind.startswith(ahead)
    assert stop is not None or ahead.removesuffix(b"<|im_end|>") == behind


@settings(max_examples=60, deadline=None)
@given(data=st.data(), which=st.sampled_from([byte_level, byte_fallback, metaspace]))
def test_any_tokens_in_any_steps(data: st.DataObject, which: Any) -> None:
    """Whatever the tokenizer, the tokens, the steps and the stop strings: each token once, in order, and never before
    its text."""
    tokenizer: Tokenizer = which()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=20))
    stop = data.draw(st.lists(st.sampled_from(["a", "b.", "é", " the", "\ufffd"]), max_size=2))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=len(ids)))
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop)
    stream = ChoiceStream(0, Telling(num_logprobs=0), Prompt([5]), tokenizer)
    pieces, fed, text = [], 0, ""
    for size in sizes:
        step = ids[fed : fed + size]
        fed += len(step)
        new = detokenizer.push(step)
        is_over = fed == len(ids) or detokenizer.stop_reason is not None
        if is_over:
            new += detokenizer.flush()
        text += new
        logprobs = [fake_logprobs(token, 0, tokenizer.vocab_size) for token in step]
        piece = stream.add(TextDelta(0, new, step, 0, "length" if is_over else None, logprobs=logprobs))
        if piece is not None:
            pieces.append(piece)
            assert all(token.offset <= len(text) for token in piece.tokens)
        if is_over:
            break
    tokens = [token for piece in pieces for token in piece.tokens]
    assert "".join([piece.text for piece in pieces]) == text
    assert [token.token_id for token in tokens] == ids[:fed]
    offsets = [token.offset for token in tokens]
    assert offsets == sorted(offsets)
    assert json.dumps(TokenShapes(tokenizer).completion_logprobs(tokens, 0))
