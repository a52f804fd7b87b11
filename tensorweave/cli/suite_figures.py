"""The figures of a suite: one JSON document for either side of a comparison, and its table in Markdown.

Written by `tensorweave bench suite` and `benchmarks/rival_vllm.py`, read by `benchmarks/compare.py`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cli.figures import machine
from tensorweave.cli.suite_rows import Row


@dataclass(slots=True)
class RowResult:
    """`runs_s` are seconds; `digests` tell the token lists of each run. `note` says what was left out, and why."""

    row: Row
    runs_s: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    roofline_s: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        row = self.row
        document: dict[str, Any] = {
            "row": row.name,
            "num_requests": row.num_requests,
            "input_len": row.input_len,
            "output_len": row.output_len,
            "runs_s": [round(run_s, 5) for run_s in self.runs_s],
            "digests": self.digests,
            "counts": "input and output" if row.is_prefill else "output",
            "note": self.note,
        }
        if self.runs_s:
            document |= {"best_s": round(min(self.runs_s), 5), "tok_s": row.num_counted_tokens / min(self.runs_s)}
        if self.roofline_s is not None:
            document |= {"roofline_s": self.roofline_s, "roofline_tok_s": row.num_counted_tokens / self.roofline_s}
        if self.runs_s and self.roofline_s is not None:
            document["roofline_share"] = self.roofline_s / min(self.runs_s)
        return document


def card() -> dict[str, str]:
    """Name and identity of the GPU on which a process of this environment runs; of the CPU if there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", visible, "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        name, uuid, driver = (part.strip() for part in answer.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        this = machine()
        return {"name": str(this["cpu"]), "uuid": str(this["platform"]), "driver": ""}
    return {"name": name, "uuid": uuid, "driver": driver}


def markdown(document: Mapping[str, Any]) -> str:
    """A suite's document as a Markdown table under a line that says how it was measured."""
    head = ["row", "requests", "in", "out", "seconds", "tok/s", "roofline tok/s", "share", "runs", "note"]
    lines = [
        [
            row["row"],
            str(row["num_requests"]),
            str(row["input_len"]),
            str(row["output_len"]),
            _number(row.get("best_s"), 3),
            _number(row.get("tok_s"), 1),
            _number(row.get("roofline_tok_s"), 1),
            _percent(row.get("roofline_share")),
            str(len(row["runs_s"])),
            row["note"],
        ]
        for row in document["rows"]
    ]
    return f"{how_measured(document)}\n\n{markdown_table(head, lines, left=(0, len(head) - 1))}\n"


def how_measured(document: Mapping[str, Any]) -> str:
    weights = document["quantization"] if document["quantization"] != "none" else document["dtype"]
    sentence = (
        f"{document['side']} {document['version']}, suite {document['suite']} ({weights} weights, "
        f"{document['kv_dtype']} KV), {document['card']['name']}, {document['date'][:10]}. "
        f"Loaded {_number(document.get('load_s'), 1)} s after its process started, "
        f"first token after {_number(document.get('first_token_s'), 1)} s."
    )
    if rates := document.get("rates"):
        sentence += (
            f" Measured here: {rates['read_bytes'] / 1e12:.3g} TB/s read, "
            f"{rates['layer_operations'] / 1e12:,.0f} TFLOP/s in the layers' products."
        )
    return sentence


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Columns other than `left` are aligned right."""
    rule = ["---" if place in left else "---:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
