"""`ServedModel`: what the body of a request is checked against, and the checks that come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.context_length import context_exceeded_by_at_least
from tensorweave.cluster.errors import ModelNotFound
from tensorweave.cluster.protocol import ModelInfo
from tensorweave.router.chat.settings import ChatSettings
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.text.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, its names, how many sequences a request may ask for, what chats are like, how large a guide may be."""

    model_names: Sequence[str]
    info: ModelInfo
    max_sequences: int
    chat: ChatSettings = field(default_factory=ChatSettings)
    guided: GuidedLimits = field(default_factory=GuidedLimits)

    def to_wire(self) -> list[Any]:
        rest = [self.max_sequences, self.chat.to_wire(), self.guided.to_wire()]
        return [list(self.model_names), self.info.to_wire(), *rest]

    @classmethod
    def from_wire(cls, fields: Sequence[Any]) -> ServedModel:
        names, info, max_sequences, chat, guided = fields
        settings = ChatSettings.from_wire(chat), GuidedLimits.from_wire(guided)
        return cls(names, ModelInfo.from_wire(info), max_sequences, *settings)


def check_name(model_names: Sequence[str], name: str) -> None:
    if name not in model_names:
        known = ", ".join(map(repr, model_names))
        raise ModelNotFound(f"the model {name[:256]!r} does not exist; this server has {known}", param="model")


def check_text(text: str, tokenizer: Tokenizer, served: ServedModel, *, param: str) -> None:
    """Refuse a text that certainly has more tokens than the context, before it is tokenized."""
    per_token, max_len = tokenizer.max_chars_per_token, served.info.max_seq_len
    if per_token is not None and len(text) > per_token * max_len:
        least = -(-len(text) // per_token)
        raise context_exceeded_by_at_least(max_len, least, prompt_param=param)
