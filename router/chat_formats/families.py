"""The families of models, one entry each, and the names that other servers have for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.json_calls import JsonCalls
from tensorweave.router.chat_formats.thinking import Thinking

_CHATML: Final = ("<|im_start|>",)

PLAIN: Final = ChatFormat(name="plain")
THINK: Final = ChatFormat(name="think", thinking=Thinking())
HERMES: Final = ChatFormat(
    name="hermes",
    calls=(JsonCalls(begin="<tool_call>", end="</tool_call>", gap="\n"),),
    thinking=Thinking(),
    turn_begins=_CHATML,
)

TEMPLATE_MARKS: Final[Sequence[tuple[Sequence[str], ChatFormat]]] = (
    (("<tool_call>",), HERMES),
    (("</think>",), THINK),
)
"""What a chat template of a family contains. The first entry decides whose marks are all there."""

TOOL_PARSERS: Final[Mapping[str, ChatFormat]] = dict.fromkeys(("hermes", "qwen", "qwen25", "qwen3"), HERMES)
REASONING_PARSERS: Final[Mapping[str, ChatFormat]] = {"qwen3": HERMES}
