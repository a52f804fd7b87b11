"""Reports of `duel.py --growth` to one SVG: output tokens per second over batch, and time over prompt length.

python benchmarks/plot_growth.py growth.json docs/growth.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 400, 300, 58, 40, 46
COLORS = {"tensorweave": "#0b6e99", "vllm": "#b3541e"}
DASHES = {"float32": "", "bfloat16": "6 4"}
NAMES = {"tensorweave": "tensorweave", "vllm": "vLLM"}


@dataclass(frozen=True)
class Line:
    side: str
    dtype: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Both axes are logarithmic."""

    title: str
    x_name: str
    lines: list[Line]

    def svg(self, shift: int) -> str:
        xs = sorted({x for line in self.lines for x, _ in line.points})
        ys = [y for line in self.lines for _, y in line.points]
        low, high = min(ys) / 1.2, max(ys) * 1.2

        def place(x: float, y: float) -> tuple[float, float]:
            right = shift + LEFT + (WIDTH - LEFT - 20) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
            down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - math.log(y / low) / math.log(high / low))
            return round(right, 1), round(down, 1)

        parts = [f'<text x="{shift + LEFT}" y="22" font-weight="bold">{self.title}</text>']
        for y in _round_numbers(low, high):
            (left, height), (right, _) = place(xs[0], y), place(xs[-1], y)
            parts.append(f'<line x1="{left}" y1="{height}" x2="{right}" y2="{height}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{height + 4}" text-anchor="end">{y:g}</text>')
        for x in xs:
            right, down = place(x, low)
            parts.append(f'<text x="{right}" y="{down + 16}" text-anchor="middle">{x:g}</text>')
        middle, down = place(math.sqrt(xs[0] * xs[-1]), low)
        parts.append(f'<text x="{middle}" y="{down + 34}" text-anchor="middle">{self.x_name}</text>')
        for line in self.lines:
            places = [place(*point) for point in line.points]
            path = " ".join(f"{x},{y}" for x, y in places)
            look = f'stroke="{COLORS[line.side]}" stroke-width="2" stroke-dasharray="{DASHES[line.dtype]}"'
            parts.append(f'<polyline points="{path}" fill="none" {look}/>')
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{COLORS[line.side]}"/>' for x, y in places]
        return "\n".join(parts)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def panels(reports: Sequence[dict[str, Any]]) -> list[Panel]:
    batches, lengths = [], []
    by_dtype: dict[str, list[dict[str, Any]]] = {}
    for row in (row for report in reports for row in report["rows"]):
        by_dtype.setdefault(row["dtype"], []).append(row)
    for dtype, rows in by_dtype.items():
        for side in (side for side in NAMES if f"{side}_tok_s" in rows[0]):
            speed = f"{side}_tok_s"
            over_batch = [(row["batch"], row[speed]) for row in rows if row["num_input"] == 128]
            times = [(row["num_input"], row["num_output"] / row[speed]) for row in rows if row["batch"] == 1]
            batches.append(Line(side, dtype, sorted(over_batch)))
            lengths.append(Line(side, dtype, sorted(times)))
    return [
        Panel("output tokens per second, 128 in, 64 out", "requests at once", batches),
        Panel("seconds for one request, 64 out", "prompt tokens", lengths),
    ]


def legend(lines: Sequence[Line]) -> str:
    parts = []
    for i, line in enumerate(lines):
        x, y = LEFT + 190 * i, HEIGHT + 14
        look = f'stroke="{COLORS[line.side]}" stroke-width="2" stroke-dasharray="{DASHES[line.dtype]}"'
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}" {look}/>')
        parts.append(f'<text x="{x + 36}" y="{y + 4}">{NAMES[line.side]}, {line.dtype}</text>')
    return "\n".join(parts)


def main() -> int:
    *sources, target = map(Path, sys.argv[1:])
    if not sources:
        print(__doc__, file=sys.stderr)
        return 2
    drawn = panels([json.loads(source.read_text(encoding="utf-8")) for source in sources])
    body = [panel.svg(WIDTH * i) for i, panel in enumerate(drawn)] + [legend(drawn[0].lines)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(drawn)} {HEIGHT + 30}" font-size="12" '
    head += 'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>'
    target.write_text("\n".join([head, *body, "</svg>\n"]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
