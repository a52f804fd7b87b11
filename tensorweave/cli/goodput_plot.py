"""Curves of goodput by request rate, one for each way of using the ranks, as an SVG file that needs no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tensorweave.cli.svg import COLORS, head, legend_entry

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 60, 560, 300
_KEY: Final = "good per s and rank"

Curves = Mapping[str, Sequence[Mapping[str, float]]]


def curves_svg(title: str, curves: Curves) -> str:
    """`curves` has the rows of each way, by its name."""
    points = [row for rows in curves.values() for row in rows]
    most_rate = max((row["rate"] for row in points), default=1.0) or 1.0
    most_good = max((row[_KEY] for row in points), default=1.0) or 1.0
    size = (_LEFT + _WIDTH + 40, _TOP + _HEIGHT + 50)
    parts = [head(*size, _LEFT, title), *_axes(most_rate, most_good)]
    for number, (name, rows) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        parts.append(legend_entry(_LEFT + 150 * number, color, name))
        places = [(_x(row["rate"], most_rate), _y(row[_KEY], most_good)) for row in rows]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return "\n".join([*parts, "</svg>\n"])


def _axes(most_rate: float, most_good: float) -> list[str]:
    parts = []
    for quarter in range(5):
        x, y = _x(quarter / 4, 1.0), _y(quarter / 4, 1.0)
        parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{_TOP + _HEIGHT}" stroke="#ddd"/>')
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + _WIDTH}" y2="{y}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{most_rate * quarter / 4:.3g}</text>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{most_good * quarter / 4:.3g}</text>')
    parts.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">requests per s</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 6}" font-size="11">within the limits, per s and rank</text>')
    return parts


def _x(rate: float, most: float) -> float:
    return _LEFT + _WIDTH * rate / most


def _y(good: float, most: float) -> float:
    return _TOP + _HEIGHT * (1 - good / most)
