"""What `tensorweave bench goodput` tells: the best rate of each way, and the ways side by side at each rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tensorweave.cli.figures import aligned
from tensorweave.cli.goodput_load import Row, best_row

GOOD: Final = "good per s and rank"
LEARNT: Final = "learnt"

Curves = Mapping[str, Sequence[Row]]


def best_table(curves: Curves, share: float) -> str:
    """The highest rate that each way serves within the limits."""
    lines = [[f"at least {share:.0%} good", "requests/s", "good/s and rank", "TTFT p99 ms", "ITL p99 ms"]]
    for way, rows in curves.items():
        row = best_row(rows, share)
        keys = ("rate", GOOD, "ttft ms p99", "itl ms p99")
        lines.append([way, *(f"{row[key]:.3g}" if row is not None else "–" for key in keys)])
    return aligned(lines, num_left=1)


def rates_table(curves: Curves) -> str:
    """Good requests per second and rank of each way, and their share of all, at each rate that some way was given."""
    ratios = learnt_ratios(curves)
    rates = sorted({row["rate"] for rows in curves.values() for row in rows})
    lines = [["requests/s", *(f"{way}, good/s and rank" for way in curves), *(["learnt / better"] if ratios else [])]]
    for rate in rates:
        rows = [_at(rows, rate) for rows in curves.values()]
        cells = ["–" if row is None else f"{row[GOOD]:.3g} ({row['good share']:.0%})" for row in rows]
        ratio = [f"{ratios[rate]:.3f}" if rate in ratios else "–"] if ratios else []
        lines.append([f"{rate:g}", *cells, *ratio])
    return aligned(lines)


def learnt_ratios(curves: Curves) -> dict[float, float]:
    """By rate, what the learnt way served within the limits, divided by the better of the others. A rate at which
    nothing else was good is left out, and so is one that the learnt way was not given."""
    ratios = {}
    for row in curves.get(LEARNT, ()):
        others = [_at(rows, row["rate"]) for way, rows in curves.items() if way != LEARNT]
        better = max((other[GOOD] for other in others if other is not None), default=0.0)
        if better:
            ratios[row["rate"]] = row[GOOD] / better
    return ratios


def _at(rows: Sequence[Row], rate: float) -> Row | None:
    return next((row for row in rows if row["rate"] == rate), None)
