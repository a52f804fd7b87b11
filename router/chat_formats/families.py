"""The families of models, one entry each, and the names that other servers have for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tensorweave.router.chat_formats.channels import Channels
from tensorweave.router.chat_formats.chat_format import CallIds, ChatFormat
from tensorweave.router.chat_formats.json_calls import JsonCalls
from tensorweave.router.chat_formats.named_calls import NamedCalls
from tensorweave.router.chat_formats.python_calls import PythonCalls
from tensorweave.router.chat_formats.tagged_parameters import TaggedParameters
from tensorweave.router.chat_formats.thinking import Thinking

_THINK: Final = Thinking()
_DEEPSEEK_SECTION: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

PLAIN: Final = ChatFormat(name="plain")
THINK: Final = ChatFormat(name="think", thinking=_THINK)
HERMES: Final = ChatFormat(
    name="hermes",
    calls=(JsonCalls(begin="<tool_call>", end="</tool_call>", gap="\n"),),
    thinking=_THINK,
)
QWEN3_CODER: Final = ChatFormat(
    name="qwen3_coder",
    calls=(
        NamedCalls(
            begin="<function=",
            name_end=">",
            end="</function>",
            section=("<tool_call>", "</tool_call>"),
            wraps_each=True,
            parameters=TaggedParameters(
                begin="<parameter=", name_end=">", end="</parameter>", is_padded=True, style="qwen_xml"
            ),
            written=("<tool_call>\n<function={name}>\n", "\n</function>\n</tool_call>", "\n"),
        ),
    ),
    thinking=Thinking(ends_at_calls=True),
)
LLAMA3: Final = ChatFormat(
    name="llama3_json",
    calls=(
        JsonCalls(begin="", arguments_key="parameters", separator="; ", guided_spelling="as guided"),
        JsonCalls(begin="<|python_tag|>", arguments_key="parameters", guided_spelling="as guided"),
    ),
)
LLAMA4: Final = ChatFormat(
    name="llama4_pythonic",
    calls=(
        PythonCalls(),
        PythonCalls(section=("<|python_start|>", "<|python_end|>")),
        JsonCalls(begin="", arguments_key="parameters", guided_spelling="none"),
    ),
)
OLMO3: Final = ChatFormat(
    name="olmo3",
    calls=(
        PythonCalls(
            section=("<function_calls>", "</function_calls>"),
            begin="",
            separator="\n",
            end="",
            guided_spelling="any",
        ),
        PythonCalls(guided_spelling="none"),
    ),
    thinking=_THINK,
)
MISTRAL: Final = ChatFormat(
    name="mistral",
    calls=(
        NamedCalls(
            begin="[TOOL_CALLS]",
            name_end="[ARGS]",
            end="",
            id_mark="[CALL_ID]",
            written=("[TOOL_CALLS]{name}[ARGS]", "", ""),
        ),
        JsonCalls(begin="[TOOL_CALLS]", in_list=True),
    ),
    thinking=Thinking(begin="[THINK]", end="[/THINK]"),
    call_ids=CallIds(prefix="", num_chars=9),
)
MISTRAL_LIST: Final = ChatFormat(
    name="mistral_list",
    calls=MISTRAL.calls[::-1],
    thinking=MISTRAL.thinking,
    call_ids=MISTRAL.call_ids,
)
DEEPSEEK_V3: Final = ChatFormat(
    name="deepseek_v3",
    calls=(
        NamedCalls(
            begin="<｜tool▁call▁begin｜>",
            name_prefix="function<｜tool▁sep｜>",
            name_end="",
            end="<｜tool▁call▁end｜>",
            section=_DEEPSEEK_SECTION,
            written=(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
                "\n```<｜tool▁call▁end｜>",
                "\n",
            ),
        ),
    ),
    thinking=_THINK,
)
DEEPSEEK_V31: Final = ChatFormat(
    name="deepseek_v31",
    calls=(
        NamedCalls(
            begin="<｜tool▁call▁begin｜>",
            name_end="<｜tool▁sep｜>",
            end="<｜tool▁call▁end｜>",
            section=_DEEPSEEK_SECTION,
            written=("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>", ""),
        ),
    ),
    thinking=_THINK,
)
DEEPSEEK_V32: Final = ChatFormat(
    name="deepseek_v32",
    calls=(
        NamedCalls(
            begin='<｜DSML｜invoke name="',
            name_end='">',
            end="</｜DSML｜invoke>",
            section=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
            parameters=TaggedParameters(
                begin='<｜DSML｜parameter name="',
                name_end='" string="',
                says_type=True,
                end="</｜DSML｜parameter>",
                style="deepseek_xml",
            ),
            written=('<｜DSML｜invoke name="{name}">\n', "</｜DSML｜invoke>\n", ""),
        ),
    ),
    thinking=_THINK,
)
DEEPSEEK_R1: Final = ChatFormat(name="deepseek_r1", calls=DEEPSEEK_V3.calls, thinking=Thinking(is_implied=True))
GLM4: Final = ChatFormat(
    name="glm4",
    calls=(
        NamedCalls(
            begin="<tool_call>",
            name_end="",
            end="</tool_call>",
            parameters=TaggedParameters(
                begin="<arg_key>", name_end="</arg_key>", value_begin="<arg_value>", end="</arg_value>", style="glm_xml"
            ),
            written=("<tool_call>{name}", "</tool_call>", ""),
        ),
    ),
    thinking=_THINK,
)
KIMI_K2: Final = ChatFormat(
    name="kimi_k2",
    calls=(
        NamedCalls(
            begin="<|tool_call_begin|>",
            name_is_id=True,
            name_end="<|tool_call_argument_begin|>",
            end="<|tool_call_end|>",
            section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
            written=(
                "<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                "",
            ),
        ),
    ),
    thinking=Thinking(ends_at_calls=True),
)
MINIMAX_M2: Final = ChatFormat(
    name="minimax_m2",
    calls=(
        NamedCalls(
            begin='<invoke name="',
            name_end='">',
            end="</invoke>",
            section=("<minimax:tool_call>", "</minimax:tool_call>"),
            parameters=TaggedParameters(
                begin='<parameter name="', name_end='">', end="</parameter>", style="minimax_xml"
            ),
            written=('<invoke name="{name}">\n', "</invoke>\n", ""),
        ),
    ),
    thinking=_THINK,
)
GPT_OSS: Final = ChatFormat(name="gpt_oss", channels=Channels())

TEMPLATE_MARKS: Final[Sequence[tuple[Sequence[str], ChatFormat]]] = (
    (("<|channel|>", "<|start|>"), GPT_OSS),
    (("<｜DSML｜",), DEEPSEEK_V32),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK_V3),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK_V31),
    (("<|tool_calls_section_begin|>",), KIMI_K2),
    (("<minimax:tool_call>",), MINIMAX_M2),
    (("<arg_key>",), GLM4),
    (("<function=", "<parameter="), QWEN3_CODER),
    (("<tool_call>",), HERMES),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<function_calls>",), OLMO3),
    (("<|header_start|>",), LLAMA4),
    (("<|start_header_id|>", '"parameters"'), LLAMA3),
    (("</think>",), THINK),
)
"""What a chat template of a family contains. The first entry decides whose marks are all there."""

TOOL_PARSERS: Final[Mapping[str, ChatFormat]] = {
    **dict.fromkeys(("hermes", "qwen", "qwen25", "qwen2_5", "qwen3"), HERMES),
    **dict.fromkeys(("qwen3_coder", "qwen3_xml", "qwen3_5", "step3p5"), QWEN3_CODER),
    **dict.fromkeys(("llama3_json", "llama3", "llama4_json"), LLAMA3),
    **dict.fromkeys(("llama4_pythonic", "pythonic", "llama4"), LLAMA4),
    "olmo3": OLMO3,
    "mistral": MISTRAL,
    "mistral_list": MISTRAL_LIST,
    **dict.fromkeys(("deepseek_v3", "deepseekv3", "deepseek_r1"), DEEPSEEK_V3),
    **dict.fromkeys(("deepseek_v31", "deepseekv31", "deepseek_v3.1", "deepseekv3.1"), DEEPSEEK_V31),
    **dict.fromkeys(("deepseek_v32", "deepseekv32", "deepseek_v3.2", "deepseekv3.2"), DEEPSEEK_V32),
    **dict.fromkeys(("glm4", "glm45", "glm47"), GLM4),
    "kimi_k2": KIMI_K2,
    **dict.fromkeys(("minimax_m2", "minimax"), MINIMAX_M2),
    **dict.fromkeys(("gpt_oss", "openai", "openai_gptoss", "harmony", "openai_harmony"), GPT_OSS),
}
REASONING_PARSERS: Final[Mapping[str, ChatFormat]] = {
    **dict.fromkeys(("qwen3", "think", "deepseek_v3", "deepseek_v31", "deepseek_v32", "glm45", "olmo3"), THINK),
    **dict.fromkeys(("qwen3_5", "qwen3_coder"), QWEN3_CODER),
    **dict.fromkeys(("deepseek_r1", "qwen3_thinking", "minimax_m2"), DEEPSEEK_R1),
    **dict.fromkeys(("kimi_k2", "kimi"), KIMI_K2),
    **dict.fromkeys(("mistral", "magistral"), MISTRAL),
    **dict.fromkeys(("gpt_oss", "openai_gptoss", "openai", "harmony", "openai_harmony"), GPT_OSS),
}
