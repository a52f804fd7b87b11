"""`ScriptedLink`: a model that does what the last message of the user tells it, for tests of agents and their clients.

A user's message may have lines `THINK text`, `CALL name {arguments}` (several calls at once are joined by `&&`) and
`SAY text`. The n-th answer to the message makes the n-th CALL; after the last one it says the text, in which `{result}`
stands for the newest result of a tool.
"""

from __future__ import annotations

import re
from typing import Final

from tensorweave.cluster.protocol import GenerateRequest, ModelInfo
from tensorweave.router.text.tokens import Tokenizer
from tests.router.fake_fleet import FakeLink

_TURN: Final = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
_LINE: Final = re.compile(r"^\s*(THINK|CALL|SAY) (.*)$", re.MULTILINE)


class ScriptedLink(FakeLink):
    """For a tokenizer whose chat template is `HERMES_TEMPLATE`."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer) -> None:
        super().__init__(info)
        self._tokenizer = tokenizer
        self._scripts: dict[str, list[int]] = {}

    def _next(self, request: GenerateRequest, tokens: list[int], num_out: int) -> int:
        if (script := self._scripts.get(request.request_id)) is None:
            prompt = self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
            script = self._tokenizer.encode(answer_to(prompt))
            self._scripts = {request.request_id: script, **dict(list(self._scripts.items())[:64])}
        return script[num_out] if num_out < len(script) else self.info.end_ids[0]


def answer_to(prompt: str) -> str:
    """What the model writes after a prompt."""
    turns = _TURN.findall(prompt)
    last = max((place for place, (role, _) in enumerate(turns) if role == "user"), default=0)
    results = [text for role, text in turns[last + 1 :] if role == "tool"]
    num_answers = sum(role == "assistant" for role, _ in turns[last + 1 :])
    lines = _LINE.findall(turns[last][1]) if turns else []
    is_thinking = not prompt.endswith("</think>\n\n")
    thoughts = "".join([f"<think>\n{text}\n</think>\n\n" for kind, text in lines if kind == "THINK" and is_thinking])
    calls = [text for kind, text in lines if kind == "CALL"]
    if num_answers < len(calls):
        return thoughts + "\n".join(map(_call, calls[num_answers].split("&&")))
    said = "\n".join([text for kind, text in lines if kind == "SAY"]) or "Yes."
    return thoughts + said.replace("{result}", results[-1] if results else "")


def _call(text: str) -> str:
    name, _, arguments = text.strip().partition(" ")
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments or "{}"}}}\n</tool_call>'
