"""Parses Google-style docstrings, for the API page and for the stability tests, which compare them with signatures."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, field
from typing import Final

_SECTIONS: Final = ("Args", "Attributes", "Returns", "Yields", "Raises", "Status")
_ENTRY: Final = re.compile(r"(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)")


@dataclass(frozen=True, slots=True)
class Docstring:
    """`text` is what comes before the first section. The entries of a section keep their order."""

    text: str = ""
    args: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    raises: dict[str, str] = field(default_factory=dict)
    returns: str = ""
    status: str = ""


def read_docstring(doc: str | None) -> Docstring:
    parts: dict[str, list[str]] = {"": []}
    section = ""
    for line in inspect.cleandoc(doc or "").splitlines():
        if line.endswith(":") and line[:-1] in _SECTIONS:
            section = line[:-1]
            parts[section] = []
        elif line and not line.startswith(" ") and section:
            raise ValueError(f"text after a docstring's sections: {line!r}")
        else:
            parts[section].append(line)
    bodies = {name: textwrap.dedent("\n".join(lines)).strip() for name, lines in parts.items()}
    return Docstring(
        bodies[""],
        _entries(bodies.get("Args", "")),
        _entries(bodies.get("Attributes", "")),
        _entries(bodies.get("Raises", "")),
        _joined(bodies.get("Returns", "") or bodies.get("Yields", "")),
        bodies.get("Status", ""),
    )


def _entries(body: str) -> dict[str, str]:
    """Entries have the form `name: text`; their further lines are indented."""
    entries: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        match = None if line.startswith(" ") else _ENTRY.fullmatch(line)
        if match:
            name = match[1].lstrip("*")
            if name in entries:
                raise ValueError(f"{name} is described twice")
            entries[name] = match[2]
        elif name and line.strip():
            entries[name] += " " + line.strip()
    return {name: text.strip() for name, text in entries.items()}


def _joined(text: str) -> str:
    return " ".join(text.split())
