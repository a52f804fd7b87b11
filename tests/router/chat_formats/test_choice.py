"""Which format a model gets: by its chat template, or by the names that an operator gives."""

from __future__ import annotations

import pytest

from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.chat_formats.families import REASONING_PARSERS, TOOL_PARSERS
from tensorweave.router.chat_formats.thinking import Thinking

TEMPLATES = {
    "hermes": '{{\'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \'}}',
    "qwen3_coder": "<tool_call>\\n<function={{call.name}}>\\n<parameter={{key}}>",
    "llama3_json": '<|start_header_id|>assistant {"name": function name, "parameters": dictionary of arguments}',
    "llama4_pythonic": "<|header_start|>assistant<|header_end|> [func_name1(params_name1=value)]",
    "olmo3": "<|im_start|>assistant <function_calls>",
    "mistral": "[TOOL_CALLS]{{name}}[ARGS]{{arguments}}",
    "mistral_list": "[TOOL_CALLS] [{{calls}}]</s>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{type}}<｜tool▁sep｜>{{name}}\\n```json\\n",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{name}}<｜tool▁sep｜>{{arguments}}",
    "deepseek_v32": '<｜DSML｜function_calls>\\n<｜DSML｜invoke name="{{name}}">',
    "glm4": "<tool_call>{{name}}\\n<arg_key>{{k}}</arg_key>\\n<arg_value>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>{{id}}",
    "minimax_m2": '<minimax:tool_call>\\n<invoke name="{{name}}">',
    "gpt_oss": "<|start|>assistant<|channel|>final<|message|>",
    "plain": "{{message.content}}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_tells_the_format(name: str) -> None:
    found = choose_format(TEMPLATES[name])
    assert found.name == name
    assert found.thinking is None, "this template knows no reasoning"
    if name not in ("gpt_oss", "llama3_json", "llama4_pythonic", "mistral", "mistral_list"):
        assert choose_format(TEMPLATES[name] + "</think>").thinking is not None


def test_mistral_thinks_in_brackets() -> None:
    thinking = choose_format("[TOOL_CALLS][ARGS][THINK]{{x}}[/THINK]").thinking
    assert thinking is not None
    assert thinking.end == "[/THINK]"


def test_without_a_template_nothing_is_recognized() -> None:
    for template in (None, ""):
        assert choose_format(template).calls == ()
        assert choose_format(template).thinking is None


def test_names_win_over_the_template() -> None:
    chosen = choose_format(TEMPLATES["hermes"] + "</think>", tool_parser="llama3_json")
    assert chosen.name == "llama3_json"
    assert chosen.thinking == Thinking(), "the template still tells the reasoning"
    assert choose_format(TEMPLATES["hermes"] + "</think>", reasoning_parser="none").thinking is None
    assert choose_format(TEMPLATES["hermes"], tool_parser="none").calls == ()
    r1 = choose_format(TEMPLATES["hermes"], reasoning_parser="deepseek-r1")
    assert (r1.name, r1.thinking) == ("hermes", Thinking(is_implied=True))


VLLM_AND_SGLANG = "hermes qwen3_coder llama3_json llama4_pythonic pythonic olmo3 mistral deepseek_v3 deepseek_v31 glm45"
TENSORRT_LLM = "qwen3 qwen3_coder kimi_k2 deepseekv3 deepseekv3.1 deepseek_v32 openai gpt_oss openai-harmony minimax_m2"


@pytest.mark.parametrize("name", sorted({*VLLM_AND_SGLANG.split(), *TENSORRT_LLM.split()}))
def test_other_servers_names_of_tool_parsers_are_known(name: str) -> None:
    chosen = choose_format(None, tool_parser=name)
    assert chosen.calls or chosen.channels


@pytest.mark.parametrize(
    "name", ["deepseek_r1", "deepseek-r1", "qwen3", "glm45", "kimi_k2", "mistral", "openai_gptoss"]
)
def test_other_servers_names_of_reasoning_parsers_are_known(name: str) -> None:
    chosen = choose_format(None, reasoning_parser=name)
    assert chosen.thinking or chosen.channels


def test_gpt_oss_has_reasoning_and_calls_in_one() -> None:
    for tools, reasoning in (("openai", None), (None, "openai_gptoss"), ("openai", "gpt_oss"), ("openai", "none")):
        assert choose_format(None, tool_parser=tools, reasoning_parser=reasoning).channels
    assert choose_format(TEMPLATES["gpt_oss"]).channels
    assert choose_format(TEMPLATES["gpt_oss"], tool_parser="hermes").channels is None
    for tools, reasoning in (("openai", "qwen3"), ("hermes", "gpt_oss")):
        with pytest.raises(ValueError, match="do not go together"):
            choose_format(None, tool_parser=tools, reasoning_parser=reasoning)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"tool_parser: unknown format 'hermez'; did you mean 'hermes'\? Known: "):
        choose_format(None, tool_parser="hermez")
    with pytest.raises(ValueError, match=r"reasoning_parser: unknown format 'x'\. Known: "):
        choose_format(None, reasoning_parser="x")


def test_all_names_are_written_as_they_are_looked_up() -> None:
    for name in (*TOOL_PARSERS, *REASONING_PARSERS):
        assert name == name.lower().replace("-", "_")
