"""`SamplingDefaults`: what a checkpoint says of sampling, for the fields that a request leaves out.

Ranks read it from `generation_config.json` (`workers.models.generation_config`) and tell it with `ModelInfo`; whoever
resolves a request's sampling fields applies it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_int, as_number, checked


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """None: the checkpoint says nothing. `temperature` 0 is greedy; `max_tokens` bounds an answer in tokens."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_tokens: int | None = None

    def said(self) -> dict[str, Any]:
        """The fields that have a value, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_wire(self) -> dict[str, Any]:
        return self.said()

    @classmethod
    def from_wire(cls, fields: Any) -> SamplingDefaults:
        values: dict[str, Any] = {}
        for name, value in checked(fields, "sampling_defaults", dict).items():
            if (read := _READERS.get(name)) is None:
                raise WireError(f"unknown sampling default {str(name)[:64]!r}")
            values[name] = read(value, name)
        return cls(**values)


_READERS: Final[dict[str, Callable[[Any, str], Any]]] = {
    "temperature": as_number,
    "top_k": as_int,
    "top_p": as_number,
    "min_p": as_number,
    "repetition_penalty": as_number,
    "no_repeat_ngram_size": as_int,
    "max_tokens": as_int,
}
