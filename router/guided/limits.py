"""`GuidedLimits`: how large what a request's output must match may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

MAX_TEXT_BYTES: Final = 256 << 10
"""Of a guide, as the workers take it: expressions may be longer there than as people write them."""


@dataclass(frozen=True, slots=True)
class GuidedLimits:
    """Bounds of one request's schema, expression or grammar; what is beyond them is refused before it is compiled.

    Attributes:
        max_bytes: Of the schema, expression, grammar or list of choices as text.
        max_depth: Levels of nesting of a schema's JSON.
        max_shapes: Alternatives of a schema, all its unions written out, and comparisons of alternatives.
        max_pattern_size: Characters of a regular expression with its bounded repetitions written out.
        max_whitespace: White-space characters between two elements of a JSON answer; 0: the compact form.
    """

    max_bytes: int = 64 << 10
    max_depth: int = 64
    max_shapes: int = 16_384
    max_pattern_size: int = 10_000
    max_whitespace: int = 8

    def to_wire(self) -> list[Any]:
        return list(astuple(self))

    @classmethod
    def from_wire(cls, fields: Sequence[Any]) -> GuidedLimits:
        return cls(*fields)
