"""`Guide`: the grammar that a request's output follows, as it travels from the router to the gangs.

The router writes it (`router/guided/`); the workers compile it for the model's vocabulary (`workers/guided/`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_int, checked

GuideKind = Literal["json_schema", "regex", "ebnf", "lark", "structural_tag"]
GuideBackend = Literal["xgrammar", "llguidance"]
BackendChoice = Literal["auto", "xgrammar", "llguidance"]
"""What an operator asks for. `auto`: xgrammar, and llguidance for what xgrammar would not enforce."""

GUIDE_KINDS: Final[tuple[GuideKind, ...]] = get_args(GuideKind)
GUIDE_BACKENDS: Final[tuple[GuideBackend, ...]] = get_args(GuideBackend)
DEFAULT_MAX_WHITESPACE: Final = 8
GUIDE_PARAM: Final = "guided_decoding"
"""What a worker's errors name as the wrong field; the router knows by which of a request's fields the guide came."""


@dataclass(frozen=True, slots=True)
class Guide:
    """What the output must match as a whole, before the stop token that ends it.

    Args:
        kind: How `text` is written. `ebnf` starts at a rule named `root`, `lark` at one named `start`;
            `structural_tag` is xgrammar's JSON form.
        text: The schema (as JSON), the pattern or the grammar.
        backend: The library that compiles and matches it.
        max_whitespace: The most white-space characters between two elements of the JSON of a `json_schema`; 0: none,
            but for one space after each comma and colon. The other kinds say it in their text.
    """

    kind: GuideKind
    text: str = field(repr=False)
    backend: GuideBackend = "xgrammar"
    max_whitespace: int = DEFAULT_MAX_WHITESPACE

    @property
    def digest(self) -> bytes:
        """Equal for equal guides, in every process: the name of a compiled grammar in a cache."""
        head = f"{self.kind}\0{self.backend}\0{self.max_whitespace}\0"
        return hashlib.blake2b((head + self.text).encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def to_wire(self) -> list[Any]:
        return [self.kind, self.text, self.backend, self.max_whitespace]

    @classmethod
    def from_wire(cls, fields: Any) -> Guide:
        try:
            kind, text, backend, max_whitespace = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed guide: {error}") from None
        if kind not in GUIDE_KINDS or backend not in GUIDE_BACKENDS:
            raise WireError(f"unknown kind or backend of a guide: {str(kind)[:64]!r}, {str(backend)[:64]!r}")
        return cls(kind, checked(text, "text", str), backend, as_int(max_whitespace, "max_whitespace"))


def guide_or_none(fields: Any, name: str) -> Guide | None:
    """Read the field of a message."""
    return None if fields is None else Guide.from_wire(fields)
