"""`tensorweave bench trace --rows`: a run of a suite's row under the profiler, from handing over its prompts to having
all tokens."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tensorweave.cli.suite_rows import Row
from tensorweave.cli.trace_events import KERNEL, last_part
from tensorweave.cli.trace_figures import device_span, operator_shares

if TYPE_CHECKING:
    from tensorweave import LLM

_NUM_UNTRACED: Final = 2


def trace_row(llm: LLM, row: Row, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the row as it is, then once more under the profiler: its seconds, and what the GPU did."""
    from tensorweave.cli.trace_profiler import recording

    runs_s = [_generate(llm, row, row.prompts(vocab_size, args.seed, run)) for run in range(_NUM_UNTRACED)]
    prompts = row.prompts(vocab_size, args.seed, _NUM_UNTRACED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json" if args.chrome is None else chrome_path(args.chrome, row.name)
        with recording(path) as trace:
            began_ns = time.time_ns()
            traced_s = _generate(llm, row, prompts)
            ended_ns = time.time_ns()
    result = {"title": row.name, "row": row.name, "seconds": min(runs_s), "traced_s": traced_s}
    if not any(event.kind == KERNEL for event in trace.events):
        shares = operator_shares(last_part(trace.events, traced_s), 1)
        return result | {"shares": [dataclasses.asdict(share) for share in shares]}
    span, shares = device_span(trace.events, trace.at_us(began_ns), trace.at_us(ended_ns))
    return result | {**dataclasses.asdict(span), "shares": [dataclasses.asdict(share) for share in shares]}


def told_row(row: dict[str, Any]) -> str:
    line = f"{row['row']}: {row['seconds']:.3f} s, {row['traced_s']:.3f} s traced"
    if "busy_ms" not in row:
        return line
    gaps = ", ".join(f"{length_ms:.1f} at {when_ms:.0f}" for when_ms, length_ms in row["gaps_ms"])
    return (
        f"{line}: first kernel after {row['before_ms']:.1f} ms, GPU busy {row['busy_ms']:.1f} ms, idle "
        f"{row['idle_ms']:.1f} ms, {row['after_ms']:.1f} ms after the last kernel; longest gaps, ms: {gaps or 'none'}"
    )


def chrome_path(path: Path, name: str) -> Path:
    """One file per trace: trace.json becomes trace-NAME.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def _generate(llm: LLM, row: Row, prompts: Sequence[list[int]]) -> float:
    from tensorweave import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=row.output_len, ignore_eos=True)
    began_s = time.perf_counter()
    llm.generate(list(prompts), sampling, use_tqdm=False)
    return time.perf_counter() - began_s
