"""`Answer`: collects the deltas of one answer. Parsers write into it."""

from __future__ import annotations

import json
from collections.abc import Callable

from tensorweave.router.chat_formats.deltas import CallArguments, CallEnd, CallStart, Content, Delta, Reasoning

NewId = Callable[[], str]


class Answer:
    """White space beside a marker (the end of the reasoning, a call) belongs to the format and is dropped; therefore
    white space at the end of a text is held back until the next character. All other text is passed on as it is.
    Between content before and after a call, the white space before the call stays, or a line break stands.

    Args:
        new_id: Makes the id of a call that has none in the text.
        has_markers: Whether there can be any; otherwise nothing is held back.
        is_after_marker: The prompt ends with a marker, such as the one that opens the reasoning.
    """

    def __init__(self, new_id: NewId, *, has_markers: bool = True, is_after_marker: bool = False) -> None:
        self._new_id = new_id
        self._has_markers = has_markers
        self._deltas: list[Delta] = []
        self._drops_space = is_after_marker
        self._held: tuple[type[Content] | type[Reasoning], str] | None = None
        self._has_content = False
        self._gap = ""
        self._arguments: list[str] | None = None
        self.num_calls = 0

    def content(self, text: str) -> None:
        self._add_text(Content, text)

    def reasoning(self, text: str) -> None:
        self._add_text(Reasoning, text)

    def marker(self) -> None:
        """A marker was read: white space before and after it has no meaning."""
        if self._has_content:
            self._gap = self._gap or (self._held[1] if self._held else "\n")
        self._held = None
        self._drops_space = True

    def start_call(self, name: str, call_id: str | None = None) -> None:
        assert self._arguments is None, "the call before has not ended"
        self.marker()
        self._arguments = []
        self._deltas.append(CallStart(self.num_calls, _encodable(call_id or self._new_id()), _encodable(name)))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        assert self._arguments is not None, "no call is open"
        if text:
            text = _encodable(text)
            self._arguments.append(text)
            self._deltas.append(CallArguments(self.num_calls - 1, text))

    def end_call(self) -> None:
        assert self._arguments is not None, "no call is open"
        is_complete = _is_object("".join(self._arguments))
        self._arguments = None
        self._deltas.append(CallEnd(self.num_calls - 1, is_complete))

    def finish(self) -> None:
        """The text has ended."""
        if self._arguments is not None:
            self.end_call()
        if self._held is not None:
            kind, text = self._held
            self._held = None
            if kind is Content:
                self._deltas.append(Content(text))

    def take(self) -> list[Delta]:
        """The deltas since the last call, neighbours of one kind joined."""
        deltas, self._deltas = self._deltas, []
        return _joined(deltas) if len(deltas) > 1 else deltas

    def _add_text(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        if self._drops_space:
            text = text.lstrip()
            if not text:
                return
            self._drops_space = False
        if self._held is not None:
            assert self._held[0] is kind, "a marker lies between content and reasoning"
            text = self._held[1] + text
        if kind is Content:
            text = self._gap + text
            self._gap, self._has_content = "", True
        visible = text.rstrip() if self._has_markers else text
        self._held = (kind, text[len(visible) :]) if len(visible) < len(text) else None
        if visible:
            self._deltas.append(kind(visible))


def _joined(deltas: list[Delta]) -> list[Delta]:
    joined: list[Delta] = []
    for delta in deltas:
        match joined[-1] if joined else None, delta:
            case Content(before), Content(text):
                joined[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                joined[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(_, text):
                joined[-1] = CallArguments(index, before + text)
            case _:
                joined.append(delta)
    return joined


def _encodable(text: str) -> str:
    """Half of a surrogate pair, which a model can write as `\\ud800` but UTF-8 cannot express, stays an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
