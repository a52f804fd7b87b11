"""What a benchmark reports: distributions, and the machine on which they were measured; as JSON and as a table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from tensorweave.cli.version import versions
from tensorweave.workers.store.disk import writing_into

_NOT_PRINTED: Final = frozenset({"benchmark", "date", "command", "settings", "machine", "runs", "rows", "best"})
_NO_SETTINGS: Final = frozenset({"run", "json", "traceback", "api_key"})
_GPU_QUERY: Final = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks of a sorted sequence."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """mean, std, min, p10, median, p90, p99, max of `values` times `scale`; empty for no values."""
    if not values:
        return {}
    ordered = sorted(value * scale for value in values)
    figures = {
        "mean": statistics.fmean(ordered),
        "std": statistics.pstdev(ordered),
        "min": ordered[0],
        "p10": percentile(ordered, 10),
        "median": percentile(ordered, 50),
        "p90": percentile(ordered, 90),
        "p99": percentile(ordered, 99),
        "max": ordered[-1],
    }
    return {name: round(figure, 4) for name, figure in figures.items()}


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "versions": versions(),
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command, without those for the report and the API key."""
    return {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS}


def report(kind: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The whole JSON: the figures at the top level, and when, where and how they were measured."""
    return {
        "benchmark": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["tensorweave", *sys.argv[1:]],
        "settings": dict(settings),
        **figures,
        "machine": machine(),
    }


def publish(result: Mapping[str, Any], path: Path | None) -> None:
    """Print the figures; write the whole report to `path` if one is given."""
    for name, value in result.items():
        if name not in _NOT_PRINTED:
            print(f"{name:>20}  {_shown(value)}")
    for row in result.get("rows", ()):
        print("  ".join(f"{name} {_shown(number)}" for name, number in row.items()))
    if path is not None:
        write_figures(path, json.dumps(result, indent=2, default=str) + "\n")


def write_figures(path: Path, text: str) -> None:
    """Write a report or a plot, and make its folder. Raises DiskFull, or an OSError with a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_into(path.parent):
        path.write_text(text, encoding="utf-8")


def aligned(lines: Sequence[Sequence[str]], *, num_left: int = 0) -> str:
    """A table: every column as wide as its widest cell, the first `num_left` of them aligned left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < num_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{part} {_shown(item)}" for part, item in value.items())
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    if shutil.which(_GPU_QUERY[0]) is None:
        return []
    try:
        answer = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
