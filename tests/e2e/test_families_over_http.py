"""Random models whose tokenizers have a family's markers as special tokens, over HTTP.

The engine lets the model use them, and the parser gets them, although answers are without special tokens.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tensorweave.router.chat_formats.families import TOOL_PARSERS
from tensorweave.router.text.tokens import Tokenizer
from tests.e2e.test_tools_over_http import CHAT, SCHEMAS, TOOLS, calls_of, chat, random_service, streamed_calls_of
from tests.router.small_tokenizers import hermes

# What the templates of these families have, and what they write before an answer.
TEMPLATES = {
    "deepseek_v3": ("<｜tool▁calls▁begin｜> ```json </think>", "<｜Assistant｜></think>"),
    "deepseek_v31": ("<｜tool▁calls▁begin｜> </think>", "<｜Assistant｜></think>"),
    "glm45": ("<arg_key> </think>", "<|assistant|>\n<think></think>\n"),
    "kimi_k2": ("<|tool_calls_section_begin|>", "<|im_assistant|>assistant<|im_middle|>"),
    "mistral": ("[TOOL_CALLS] [ARGS]", "[/INST]"),
    "llama4_pythonic": ("<|header_start|>", "<|header_start|>assistant<|header_end|>\n\n"),
    "qwen3_coder": ("<function= <parameter=", "<|im_start|>assistant\n"),
    "gpt_oss": ("<|channel|>", "<|start|>assistant"),
}


def tokenizer_of(name: str) -> Tokenizer:
    """A small vocabulary and the family's markers, those without spaces and quotes as special tokens."""
    marks, generation_prompt = TEMPLATES[name]
    backend = copy.deepcopy(hermes().backend)
    markers = [marker for marker in TOOL_PARSERS[name].markers if not set(marker) & set(' "{}()') and len(marker) > 3]
    backend.add_special_tokens({"additional_special_tokens": sorted(markers)})
    backend.chat_template = (
        "{#"
        + marks
        + "#}{% for message in messages %}{{ message.content }}{% endfor %}{{ "
        + json.dumps(generation_prompt)
        + " }}"
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("name", TEMPLATES)
def test_required_calls_are_right(name: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    with random_service(tmp_path, tokenizer_of(name)) as service:
        bodies = [chat(**fields, seed=seed) for seed in range(6)]
        if name == "gpt_oss":
            bodies = [{**body, "thinking_token_budget": 5} for body in bodies]
        whole = [calls_of(answer) for answer in service.ask(CHAT, *bodies)]
        streamed = [streamed_calls_of(a) for a in service.ask(CHAT, *[{**body, "stream": True} for body in bodies])]
    assert streamed == whole
    for [(function, arguments)] in whole:
        jsonschema.validate(json.loads(arguments), SCHEMAS[function])
