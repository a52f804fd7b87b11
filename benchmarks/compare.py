"""Our figures of a suite over the rival's, row by row, as a Markdown table, and as bars.

    python benchmarks/compare.py ours.json rival.json [--markdown OUT] [--plot OUT.svg]

Takes what `tensorweave bench suite --json` and `benchmarks/rival_vllm.py --json` wrote. Refuses files of different
cards, suites, formats or token lists. Where one side has more runs of a row, only those that both have count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.suite_figures import how_measured, markdown_table
from tensorweave.cli.suite_plot import bars_svg

SAME = ("suite", "dtype", "quantization", "kv_dtype", "weights", "seed")
Document = Mapping[str, Any]


class NotComparable(ValueError):
    """The two files do not say how one engine compares with the other."""


def check(ours: Document, rival: Document) -> None:
    if ours["card"] != rival["card"]:
        raise NotComparable(f"different cards: {ours['card']} and {rival['card']}")
    for key in SAME:
        if ours[key] != rival[key]:
            raise NotComparable(f"different {key}: {ours[key]!r} and {rival[key]!r}")
    rival_rows = {row["row"]: row for row in rival["rows"]}
    for row in ours["rows"]:
        other = rival_rows.get(row["row"])
        pairs = zip(row["digests"], other["digests"], strict=False) if other else ()
        if any(mine != theirs for mine, theirs in pairs):
            raise NotComparable(f"{row['row']}: different token lists")


def compared(ours: Document, rival: Document) -> list[dict[str, Any]]:
    """Rates of each row of ours, and their ratio where the rival has the row too. Raises NotComparable."""
    check(ours, rival)
    rival_rows = {row["row"]: row for row in rival["rows"]}
    return [_ratio(row, rival_rows.get(row["row"])) for row in ours["rows"]]


def _ratio(ours: Document, rival: Document | None) -> dict[str, Any]:
    line = {key: ours[key] for key in ("row", "num_requests", "input_len", "output_len", "counts")}
    line["roofline_tok_s"] = ours.get("roofline_tok_s")
    line["num_runs"] = num_runs = min(len(ours["runs_s"]), len(rival["runs_s"]) if rival else 0)
    if not num_runs or rival is None:
        return line | {"note": ours["note"] or (rival["note"] if rival else "the rival did not run it")}
    tokens = ours["num_requests"] * (ours["output_len"] + (ours["input_len"] if ours["output_len"] == 1 else 0))
    ours_s, rival_s = (min(side["runs_s"][:num_runs]) for side in (ours, rival))
    line |= {"ours_tok_s": tokens / ours_s, "rival_tok_s": tokens / rival_s, "ratio": rival_s / ours_s}
    if "roofline_s" in ours:
        line |= {"ours_share": ours["roofline_s"] / ours_s, "rival_share": ours["roofline_s"] / rival_s}
    return line | {"note": "; ".join(note for note in (ours["note"], rival["note"]) if note)}


def table(ours: Document, rival: Document) -> str:
    head = ["row", f"{rival['side']} tok/s", f"{ours['side']} tok/s", "ratio", "roofline tok/s"]
    head += [f"{rival['side']}'s share", f"{ours['side']}'s share", "runs", "note"]
    lines = [
        [
            line["row"],
            _shown(line.get("rival_tok_s"), ",.1f"),
            _shown(line.get("ours_tok_s"), ",.1f"),
            _shown(line.get("ratio"), ".3f") + (" ×" if "ratio" in line else ""),
            _shown(line["roofline_tok_s"], ",.1f"),
            _shown(line.get("rival_share"), ".1%"),
            _shown(line.get("ours_share"), ".1%"),
            str(line["num_runs"]),
            line["note"],
        ]
        for line in compared(ours, rival)
    ]
    return "\n\n".join([how_measured(ours), how_measured(rival), markdown_table(head, lines, left=(0, len(head) - 1))])


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path)
    parser.add_argument("rival", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    ours, rival = (json.loads(path.read_text(encoding="utf-8")) for path in (args.ours, args.rival))
    try:
        text = table(ours, rival)
    except NotComparable as error:
        print(f"not comparable: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.plot is not None:
        args.plot.write_text(bars_svg([ours, rival]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
