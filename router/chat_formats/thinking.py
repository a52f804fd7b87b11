"""`Thinking`: the markers around a model's reasoning, and whether the prompt has opened it already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.source import NoCall, Source, Step
from tensorweave.router.chat_formats.structural_tags import TagFormat, any_text, matching, optional, sequence, tag

_TURN_BEGINS: Final = (
    *("<|im_start|>", "<|start_header_id|>", "<|header_start|>", "<｜Assistant｜>", "[/INST]", "[/TOOL_RESULTS]"),
    *(
        "<|assistant|>",
        "<|im_assistant|>",
        "]~b]ai",
        "<start_of_turn>",
        "<|start_of_role|>",
        "[|assistant|]",
        "<|turn>",
    ),
)
"""What templates write before an answer. What users wrote about reasoning stands before that."""
ThinkingState = Literal["open", "closed", "unopened"]
"""Where an answer begins: within the reasoning, after it, or before a reasoning that the model may open itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thinking:
    """Reasoning stands at the beginning of an answer.

    Args:
        begin: Opens it: in the prompt, written by the chat template, or in the answer.
        end: Closes it.
        is_implied: An answer begins within the reasoning although the prompt does not open it.
        ends_at_calls: The model also calls tools out of its reasoning, without closing it.
    """

    begin: str = "<think>"
    end: str = "</think>"
    is_implied: bool = False
    ends_at_calls: bool = False

    def state(self, prompt_tail: str) -> ThinkingState:
        """The state after the last of the markers in the assistant's turn, which the prompt began and the answer
        continues."""
        turn = prompt_tail[max(0, *map(prompt_tail.rfind, _TURN_BEGINS)) :]
        begin, end = turn.rfind(self.begin), turn.rfind(self.end)
        if begin > end:
            return "open"
        if end >= 0:
            return "closed"
        return "open" if self.is_implied else "unopened"

    def read_begin(self, source: Source, answer: Answer, state: ThinkingState) -> Step[bool]:
        """Read what opens the reasoning. Return whether the answer begins with reasoning."""
        source.mark()
        try:
            yield from source.expect(self.begin)
        except NoCall:
            source.reset()
            return state == "open"
        source.release()
        answer.marker()
        return True

    def tag(self, state: ThinkingState, call_markers: Sequence[str], max_tokens: int | None = None) -> TagFormat | None:
        """The reasoning in a guide, of at most `max_tokens` tokens. None: there is none any more. A guide holds calls
        to their schemas only after the reasoning, so if the model may call out of it, it has to close it first."""
        if state == "closed":
            return None
        begin = "" if state == "open" else self.begin
        text = any_text(max_tokens, call_markers if self.ends_at_calls else ())
        part = sequence(tag(begin, text, self.end), matching(r"\n{0,2}"))
        return part if state == "open" else optional(part)
