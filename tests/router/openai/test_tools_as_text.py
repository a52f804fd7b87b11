"""Tools of a model whose chat template knows none: they are text of the messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.openai.chat_form import chat_format, has_tools_as_text
from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.tools_as_text import with_tools_as_text
from tests.router.calls import CHAT, post
from tests.router.fake_fleet import FakeLink
from tests.router.serving import MODEL, model_info, script_of
from tests.router.small_tokenizers import byte_level, byte_level_with, hermes

LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "Köln"}'}}
WRITTEN = '<tool_call>\n{"name": "look", "arguments": {"at": "Köln"}}\n</tool_call>'


def ask(*later: dict[str, Any], script: str = "Yes.", **fields: Any) -> tuple[str, dict[str, Any]]:
    """The prompt that the gang gets, and the answer's choice."""
    link = FakeLink(model_info(max_seq_len=4096), script=script_of(script))
    messages = [{"role": "user", "content": "Look at Köln."}, *later]
    answer = post(CHAT, {"model": MODEL, "messages": messages, "tools": [LOOK], **fields}, link)
    assert answer.status_code == 200, answer.text
    prompt = byte_level().decode(link.requests[0].prompt_token_ids, skip_special_tokens=False)
    return prompt, answer.json()["choices"][0]


def test_the_system_message_has_the_functions() -> None:
    prompt, _ = ask()
    assert prompt.startswith("<|im_start|>system\n")
    assert json.dumps(LOOK, separators=(",", ":")) in prompt
    assert prompt.index("<tools>") < prompt.index("</tools>") < prompt.index("Look at Köln.")
    assert "<tools>" not in ask(tool_choice="none")[0]


def test_calls_of_the_answer_are_found() -> None:
    _, choice = ask(script=WRITTEN)
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"at": "Köln"}'}


def test_a_conversation_with_calls_is_written_whole() -> None:
    prompt, _ = ask(
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "a cathedral"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "a river"}]},
    )
    call = '<tool_call>\n{"name":"look","arguments":{"at":"Köln"}}\n</tool_call>'
    answers = "<tool_response>\na cathedral\n</tool_response>\n<tool_response>\na river\n</tool_response>"
    assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n<|im_start|>user\n{answers}<|im_end|>" in prompt


def test_a_system_message_is_kept() -> None:
    prompt = ChatPrompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], tools=[LOOK])
    first, second = with_tools_as_text(prompt).messages
    assert first["content"].startswith("Be brief.\n\n")
    assert second == {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        (None, ChatSettings(), True),
        (None, ChatSettings(tool_parser="hermes"), True),
        (None, ChatSettings(tool_parser="llama3_json"), False),
        (None, ChatSettings(tool_parser="none"), False),
        ("{{ tools }}{{ messages[0].content }}", ChatSettings(), False),
    ],
)
def test_who_writes_tools_as_text(template: str | None, settings: ChatSettings, expected: bool) -> None:
    tokenizer = byte_level() if template is None else byte_level_with(template)
    assert has_tools_as_text(chat_format(tokenizer, settings), tokenizer) == expected


def test_a_template_that_knows_tools_writes_them_itself() -> None:
    assert not has_tools_as_text(chat_format(hermes(), ChatSettings()), hermes())
