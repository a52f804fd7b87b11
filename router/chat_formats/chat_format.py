"""`ChatFormat`: how a family of models writes reasoning and calls of tools; from it a parser and a guide."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.chat_formats.answer import Answer
from tensorweave.router.chat_formats.channels import Channels
from tensorweave.router.chat_formats.guide import TagWriter, WantedAnswer
from tensorweave.router.chat_formats.parser import AnswerParser, CallSyntax, parse_answer
from tensorweave.router.chat_formats.source import Source
from tensorweave.router.chat_formats.structural_tags import TagFormat
from tensorweave.router.chat_formats.thinking import Thinking, ThinkingState
from tensorweave.router.chat_formats.tools import FunctionTool, OfferedTools, ToolChoice
from tensorweave.router.guided.limits import GuidedLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class CallIds:
    """What the ids of calls look like that the model does not write itself."""

    prefix: str = "call_"
    num_chars: int = 24

    def draw(self, source: random.Random) -> str:
        return self.prefix + "".join(source.choices(string.ascii_letters + string.digits, k=self.num_chars))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """The format of a family's answers. It is data (`families.py`), shared by all requests.

    Args:
        name: Of the family, for messages.
        calls: The ways in which it writes calls, the usual one first; none: tools are not recognized.
        thinking: The markers of its reasoning; None: it has none.
        channels: Its answers are messages in channels; it has no `calls` and no `thinking` then.
        call_ids: The ids of calls.
    """

    name: str
    calls: tuple[CallSyntax, ...] = ()
    thinking: Thinking | None = None
    channels: Channels | None = None
    call_ids: CallIds = CallIds()

    @property
    def has_reasoning(self) -> bool:
        """Whether answers may have reasoning."""
        return self.thinking is not None or self.channels is not None

    @property
    def markers(self) -> frozenset[str]:
        """The texts that the parser looks for. Where they are special tokens of the model, or contain one, the text of
        an answer must have them even if the request says `skip_special_tokens`; other special tokens it need not."""
        thinking = (self.thinking.begin, self.thinking.end) if self.thinking else ()
        channels = self.channels.markers if self.channels else ()
        calls = [text for syntax in self.calls for text in syntax.texts]
        return frozenset(filter(None, (*thinking, *channels, *calls)))

    def parser(
        self,
        prompt_tail: str = "",
        tools: Sequence[FunctionTool] = (),
        tool_choice: ToolChoice = ToolChoice.AUTO,
        *,
        is_parallel: bool = True,
        rng: random.Random | None = None,
    ) -> AnswerParser:
        """A parser for one answer.

        Args:
            prompt_tail: The end of the prompt's text, at least all that it has of the assistant's turn: it shows
                whether the template has opened the reasoning. A tail from before the turn does no harm.
            tools: The request's functions. Without tools, or with `tool_choice` none, nothing is a call.
            is_parallel: The answer may have several calls.
            rng: For ids; the system's randomness by default.
        """
        source, ids = Source(), rng or random.SystemRandom()
        state = self.thinking_state(prompt_tail)
        offered = OfferedTools.of(tools, tool_choice, is_parallel=is_parallel)
        answer = Answer(
            lambda: self.call_ids.draw(ids),
            has_markers=bool(self.thinking or self.channels or (self.calls and offered)),
            is_after_marker=state != "unopened",
        )
        if self.channels is not None:
            return AnswerParser(source, answer, self.channels.steps(source, answer, offered, prompt_tail))
        return AnswerParser(source, answer, parse_answer(source, answer, self.thinking, state, self.calls, offered))

    def thinking_state(self, prompt_tail: str) -> ThinkingState:
        """Whether an answer to this prompt begins within the reasoning. Without reasoning: `unopened`."""
        return "unopened" if self.thinking is None else self.thinking.state(prompt_tail)

    def guide(
        self,
        tools: Sequence[FunctionTool] = (),
        tool_choice: ToolChoice = ToolChoice.AUTO,
        *,
        is_parallel: bool = True,
        prompt_tail: str = "",
        answer_guide: Guide | None = None,
        max_thinking_tokens: int | None = None,
        limits: GuidedLimits | None = None,
    ) -> Guide | None:
        """The guide that the whole answer must follow, reasoning included; None if it is free. It needs the backend
        xgrammar, unless it is `answer_guide` itself.

        There is one if a call is required, if a function is strict, if not all tools are allowed, or not several calls,
        if the answer has a form, or if the reasoning has a limit.

        Args:
            tools: The request's functions.
            is_parallel: The answer may have several calls.
            prompt_tail: As in `parser`.
            answer_guide: The form of the answer, if it is not a call.
            max_thinking_tokens: The limit of the reasoning; then its end is forced.
            limits: Of the functions' schemas.

        Raises:
            RequestRejected: Tools without a known format, a strict function whose schema is not enforced, or an
                `answer_guide` that cannot be part of another guide.
        """
        allowed = [tool for tool in tools if tool_choice.allows(tool)]
        if allowed and not self.calls and self.channels is None:
            raise RequestRejected("this model has no known format for calls; see tool_parser", param="tools")
        thinking = self._thinking_tag(prompt_tail, max_thinking_tokens)
        if answer_guide is not None and thinking is None and not allowed:
            return answer_guide
        is_flat = bool(self.calls) and self.calls[0].is_flat
        writer = TagWriter(limits or GuidedLimits())
        wanted = writer.wanted(tools, tool_choice, is_parallel=is_parallel, answer_guide=answer_guide, is_flat=is_flat)
        if wanted.is_free and (thinking is None or max_thinking_tokens is None):
            return None
        return writer.write(self.markers, thinking, self._tag(wanted))

    def _thinking_tag(self, prompt_tail: str, max_tokens: int | None) -> TagFormat | None:
        if self.channels is not None:
            return self.channels.thinking(max_tokens)
        if self.thinking is None:
            return None
        markers = [marker for syntax in self.calls for marker in syntax.markers]
        return self.thinking.tag(self.thinking_state(prompt_tail), markers, max_tokens)

    def _tag(self, wanted: WantedAnswer) -> TagFormat:
        if self.channels is not None:
            return self.channels.tag(wanted)
        excludes = (self.thinking.begin, self.thinking.end) if self.thinking else ()
        return wanted.tag(self.calls[0] if self.calls else None, excludes)
