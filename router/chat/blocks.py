"""`Blocks`: an answer as the parts that a client sees one after another: reasoning, texts and calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tensorweave.router.chat_formats.deltas import CallArguments, CallEnd, CallStart, Content, Delta, Reasoning

BlockKind = Literal["reasoning", "content", "call"]


@dataclass(slots=True)
class Block:
    """A run of deltas of one kind. `text` of a call is its arguments."""

    index: int
    kind: BlockKind
    call_id: str = ""
    name: str = ""
    _parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str) -> None:
        self._parts.append(text)


@dataclass(frozen=True, slots=True)
class BlockStep:
    """A block begins, grows by `text`, or ends."""

    kind: Literal["start", "piece", "end"]
    block: Block
    text: str = ""


class Blocks:
    """All blocks of one choice so far. Only the last one may be open."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._is_open = False

    def add(self, deltas: Sequence[Delta]) -> Iterator[BlockStep]:
        """The steps of these deltas. Consume them all."""
        for delta in deltas:
            match delta:
                case Content(text):
                    yield from self._add_text("content", text)
                case Reasoning(text):
                    yield from self._add_text("reasoning", text)
                case CallStart(_, call_id, name):
                    yield from self._begin("call", call_id, name)
                case CallArguments(_, text):
                    yield self._grow(text)
                case CallEnd():
                    yield from self.end()

    def collect(self, deltas: Sequence[Delta]) -> None:
        for _ in self.add(deltas):
            pass

    def end(self) -> Iterator[BlockStep]:
        """End the block that is open, if one is."""
        if self._is_open:
            self._is_open = False
            yield BlockStep("end", self.blocks[-1])

    def of(self, kind: BlockKind) -> list[Block]:
        return [block for block in self.blocks if block.kind == kind]

    def text_of(self, kind: BlockKind) -> str:
        return "".join([block.text for block in self.of(kind)])

    def _add_text(self, kind: BlockKind, text: str) -> Iterator[BlockStep]:
        if not self._is_open or self.blocks[-1].kind != kind:
            yield from self._begin(kind)
        yield self._grow(text)

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> Iterator[BlockStep]:
        yield from self.end()
        self.blocks.append(Block(len(self.blocks), kind, call_id, name))
        self._is_open = True
        yield BlockStep("start", self.blocks[-1])

    def _grow(self, text: str) -> BlockStep:
        block = self.blocks[-1]
        block.add(text)
        return BlockStep("piece", block, text)
