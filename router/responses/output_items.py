"""`OutputItems`: the blocks of an answer as items of a response, and the events in which they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from tensorweave.router.chat.blocks import Block, BlockStep

Status = Literal["in_progress", "completed", "incomplete"]
Event = tuple[str, dict[str, Any]]

_PREFIXES: Final = {"content": "msg", "reasoning": "rs", "call": "fc"}


class OutputItems:
    """`has_summary`: reasoning comes as the item's summary, else as its content."""

    def __init__(self, answer_id: str, *, has_summary: bool) -> None:
        self._suffix = answer_id.partition("_")[2]
        self._has_summary = has_summary

    def all(self, blocks: Sequence[Block], *, is_cut: bool) -> list[dict[str, Any]]:
        """The items of whole blocks. `is_cut`: the last one is incomplete."""
        last = len(blocks) - 1
        return [
            self._item(block, "incomplete" if is_cut and place == last else "completed")
            for place, block in enumerate(blocks)
        ]

    def events(self, step: BlockStep, *, is_cut: bool) -> Iterator[Event]:
        """The events of one step. `is_cut`: a block that ends is incomplete."""
        block = step.block
        place = {"output_index": block.index}
        match step.kind:
            case "start":
                yield (
                    "response.output_item.added",
                    {**place, "item": self._item(Block(block.index, block.kind, block.call_id, block.name))},
                )
                yield from self._part_event("added", block, "")
            case "piece":
                yield self._text_event("delta", block, step.text)
            case "end":
                yield self._text_event("done", block, block.text)
                yield from self._part_event("done", block, block.text)
                status: Status = "incomplete" if is_cut else "completed"
                yield "response.output_item.done", {**place, "item": self._item(block, status)}

    def _item(self, block: Block, status: Status = "in_progress") -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._id(block), "status": status}
        parts = [] if status == "in_progress" else [self._part(block, block.text)]
        match block.kind:
            case "content":
                return {"type": "message", "role": "assistant", **item, "content": parts}
            case "call":
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return {"type": "function_call", **item, **call}
            case "reasoning" if self._has_summary:
                return {"type": "reasoning", **item, "summary": parts}
            case "reasoning":
                return {"type": "reasoning", **item, "summary": [], "content": parts}

    def _part(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "content":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self._has_summary else "reasoning_text", "text": text}

    def _part_event(self, what: Literal["added", "done"], block: Block, text: str) -> Iterator[Event]:
        """Calls have no parts."""
        if block.kind == "call":
            return
        name = "reasoning_summary_part" if self._is_summary(block) else "content_part"
        yield f"response.{name}.{what}", {**self._where(block), "part": self._part(block, text)}

    def _text_event(self, what: Literal["delta", "done"], block: Block, text: str) -> Event:
        fields = self._where(block)
        match block.kind:
            case "content":
                name, key, fields = "output_text", "text", {**fields, "logprobs": []}
            case "call":
                name, key = "function_call_arguments", "arguments"
                fields = fields if what == "delta" else {**fields, "name": block.name}
            case "reasoning":
                name, key = ("reasoning_summary_text" if self._has_summary else "reasoning_text"), "text"
        return f"response.{name}.{what}", {**fields, "delta" if what == "delta" else key: text}

    def _where(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._id(block), "output_index": block.index}
        if block.kind == "call":
            return place
        return {**place, "summary_index" if self._is_summary(block) else "content_index": 0}

    def _is_summary(self, block: Block) -> bool:
        return block.kind == "reasoning" and self._has_summary

    def _id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self._suffix}{block.index:02x}"
