"""`GuideParams`: what a request says about the form of its output, over HTTP and through the LLM API alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

KINDS: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuideParams:
    """One of `KINDS` is given.

    Attributes:
        json: A JSON schema, as data or as text.
        regex: A regular expression that the whole output matches.
        choice: The output is one of these.
        grammar: An EBNF grammar (Lark with the backend llguidance).
        json_object: Any JSON object.
        structural_tag: xgrammar's structural tag, as data or as text.
        max_whitespace: The most white-space characters between two elements of JSON; None: the server's default.
        disable_additional_properties: No object has properties that the schema does not declare.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | dict[str, Any] | None = None
    max_whitespace: int | None = None
    disable_additional_properties: bool = False

    @property
    def given(self) -> list[str]:
        """Which of `KINDS` are given."""
        return [
            name for name in KINDS if getattr(self, name) is not None and (getattr(self, name) or name != "json_object")
        ]
