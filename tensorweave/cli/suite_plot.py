"""Bars per row of a suite, as an SVG file that needs no library: the share of the roofline that each side reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from tensorweave.cli.svg import COLORS, head, legend_entry

_LEFT, _WIDTH, _BAR, _GAP, _TOP = 190, 520, 16, 12, 64


def bars_svg(documents: Sequence[Mapping[str, Any]]) -> str:
    """One group of bars per row of the first document, with a bar for each document that has the row. The first one
    has the rooflines."""
    first = documents[0]
    rows = [row for row in first["rows"] if "roofline_tok_s" in row]
    group = len(documents) * _BAR + _GAP
    height = _TOP + len(rows) * group + 30
    parts = [head(_LEFT + _WIDTH + 110, height, _LEFT, _title(first)), *_legend(documents), *_axis(height)]
    for place, row in enumerate(rows):
        top = _TOP + place * group
        middle = top + len(documents) * _BAR / 2 + 4
        parts.append(f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(row["row"])}</text>')
        for number, document in enumerate(documents):
            found = next((other for other in document["rows"] if other["row"] == row["row"]), None)
            if found is not None and "tok_s" in found:
                parts += _bar(top + number * _BAR, found["tok_s"], row["roofline_tok_s"], COLORS[number])
    return "\n".join([*parts, "</svg>\n"])


def _title(document: Mapping[str, Any]) -> str:
    return f"{document['suite']} on {document['card']['name']}: tokens per second, and their share of the roofline"


def _legend(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        legend_entry(_LEFT + 200 * number, COLORS[number], f"{document['side']} {document['version']}")
        for number, document in enumerate(documents)
    ]


def _axis(height: int) -> list[str]:
    parts = []
    for percent in range(0, 101, 25):
        x = _LEFT + _WIDTH * percent / 100
        parts.append(f'<line x1="{x}" y1="{_TOP - 8}" x2="{x}" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{percent} %</text>')
    return parts


def _bar(y: float, tok_s: float, roofline_tok_s: float, color: str) -> list[str]:
    width = round(_WIDTH * min(1.0, tok_s / roofline_tok_s), 1)
    return [
        f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_BAR - 3}" fill="{color}"/>',
        f'<text x="{_LEFT + width + 5}" y="{y + 11}" font-size="11">{tok_s:,.0f}</text>',
    ]
