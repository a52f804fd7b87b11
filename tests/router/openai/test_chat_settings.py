"""What an operator says about chats: the parsers, and whether requests may have templates of their own."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.http.app import build_app
from tests.router.calls import CHAT, check_error
from tests.router.fake_fleet import FakeLink
from tests.router.serving import chat, client_of, make_service, model_info, script_of
from tests.router.small_tokenizers import byte_level, hermes

THOUGHT = "<think>Hm.</think>Yes."
TEMPLATES = ChatSettings(accepts_templates=True)


def ask(settings: ChatSettings, link: FakeLink | None = None, **fields: Any) -> httpx.Response:
    link = link or FakeLink(model_info(), script=script_of(THOUGHT))
    tokenizer = fields.pop("tokenizer", byte_level())

    async def call() -> httpx.Response:
        service = make_service(link, chat=settings, tokenizer=tokenizer)
        try:
            async with client_of(build_app(service)) as client:
                return await client.post(CHAT, json=chat(**fields))
        finally:
            await service.bodies.close()

    return asyncio.run(call())


def content(answer: httpx.Response) -> Any:
    return answer.json()["choices"][0]["message"]["content"]


def test_a_parser_may_be_named_or_switched_off() -> None:
    assert content(ask(ChatSettings())) == THOUGHT
    assert content(ask(ChatSettings(reasoning_parser="qwen3"))) == "Yes."
    assert content(ask(ChatSettings(), tokenizer=hermes())) == "Yes."
    assert content(ask(ChatSettings(reasoning_parser="none"), tokenizer=hermes())) == THOUGHT
    with pytest.raises(ValueError, match="tool_parser: unknown format 'x'"):
        make_service(chat=ChatSettings(tool_parser="x"))


def test_tools_are_refused_where_no_format_is_wanted() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    for given in ({"tools": [{"type": "function", "function": function}]}, {"functions": [function]}):
        [param] = given
        link = FakeLink(model_info())
        check_error(ask(ChatSettings(tool_parser="none"), link, **given), 400, param)
        assert not link.requests


def test_reasoning_in_a_channel_is_no_part_of_the_content() -> None:
    settings = ChatSettings(reasoning_parser="gpt_oss", tool_parser="gpt_oss")
    check_error(ask(settings, separate_reasoning=False), 400, "separate_reasoning")


def test_a_request_may_bring_its_template_where_the_operator_lets_it() -> None:
    link = FakeLink(model_info(), script=script_of("Yes."))
    template = "{{ messages[0].content }}{{ word }}"
    ask(TEMPLATES, link, chat_template=template, chat_template_kwargs={"word": " there"})
    assert byte_level().decode(link.requests[0].prompt_token_ids) == "Hi there"
    check_error(ask(ChatSettings(), chat_template=template), 400, "chat_template")


@pytest.mark.parametrize(
    "template",
    [
        "{{",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_that_requests_own_error(template: str) -> None:
    check_error(ask(TEMPLATES, chat_template=template), 400, "chat_template")
