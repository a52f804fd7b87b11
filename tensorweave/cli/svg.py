"""What plots of benchmarks have in common: SVG files that need no library."""

from __future__ import annotations

from typing import Final
from xml.sax.saxutils import escape

COLORS: Final = ("#0b6e99", "#b3541e", "#3a7d44", "#6a4c93")


def head(width: int, height: int, left: int, title: str) -> str:
    """The start of a white picture of this size in pixels, with its title `left` of them from the edge."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12" '
        'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{left}" y="20" font-weight="bold">{escape(title)}</text>'
    )


def legend_entry(x: int, color: str, name: str) -> str:
    """A square of the colour and what it stands for, below the title."""
    return (
        f'<rect x="{x}" y="30" width="12" height="12" fill="{color}"/>\n<text x="{x + 18}" y="41">{escape(name)}</text>'
    )
