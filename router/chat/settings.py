"""`ChatSettings`: what a service's configuration says about chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Attributes:
    tool_parser: The family in whose form the model writes calls of tools; None: its chat template says it.
    reasoning_parser: The same for its reasoning.
    accepts_templates: A request may have a chat template of its own.
    """

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    accepts_templates: bool = False

    def to_wire(self) -> list[Any]:
        return [self.tool_parser, self.reasoning_parser, self.accepts_templates]

    @classmethod
    def from_wire(cls, fields: Sequence[Any]) -> ChatSettings:
        return cls(*fields)
