"""Runs the tests of the GPU kernels under compute-sanitizer, which comes with the CUDA toolkit, and prints a table.

    python benchmarks/gpu_sanitizer.py                     memcheck: accesses out of bounds or misaligned
    python benchmarks/gpu_sanitizer.py --tool racecheck    races in shared memory
    python benchmarks/gpu_sanitizer.py --tool synccheck    barriers that not all threads reach
    python benchmarks/gpu_sanitizer.py --tool initcheck    global memory that is read before it is written

One process per file of tests, several at a time, at the small shapes: full-size grids take too long. Torch's allocator
does not cache, so that each tensor is an allocation of its own and reading past its end is an error. Torch's own
kernels are not looked at. Exit code 1 if the sanitizer reports an error or a test fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
FILES: Final = (
    "tests/kernels/attention/test_cuda_prefill.py",
    "tests/kernels/attention/test_triton_decode.py",
    "tests/kernels/attention/test_triton_prefill.py",
    "tests/kernels/blocks/test_digest.py",
    "tests/kernels/blocks/test_triton.py",
    "tests/kernels/heads/test_triton_heads.py",
    "tests/kernels/linear/test_cuda_few.py",
    "tests/kernels/linear/test_cuda_wide.py",
    "tests/kernels/linear/test_triton_quantized.py",
    "tests/kernels/linear/test_triton_thin.py",
    "tests/kernels/norm/test_triton_norm.py",
    "tests/kernels/penalties/test_penalties.py",
    "tests/kernels/sample/test_hopper_sample.py",
    "tests/kernels/sample/test_triton_sample.py",
    "tests/kernels/step/test_triton_step.py",
)
SMALL: Final = "not full and not repeats and not distribution and not same_bits"
THEIRS: Final = ("_ZN2at", "cutlass", "cublas", "nvjet")
"""Parts of the names of torch's kernels and of its libraries'."""
_SUMMARY: Final = re.compile(r"=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
_RESULT: Final = re.compile(r"(\d+) (passed|failed|skipped|error)")


@dataclass(frozen=True, slots=True)
class Report:
    """What the sanitizer and pytest said of one file; `num_found` is None where the sanitizer said nothing."""

    file: str
    num_found: int | None
    results: str
    seconds: float
    output: str

    @property
    def is_clean(self) -> bool:
        return self.num_found == 0 and "passed" in self.results and not re.search("failed|error", self.results)


def check(tool: str, file: str, selection: str, timeout_s: float) -> Report:
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    command += [part for name in THEIRS for part in ("--kernel-name-exclude", f"kernel_substring={name}")]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-k", selection, file]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    start_s = time.monotonic()
    try:
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=timeout_s
        )
        output = ended.stdout + ended.stderr
    except subprocess.TimeoutExpired as error:
        output = f"{_text(error.stdout)}\n{_text(error.stderr)}\nended after {timeout_s:g} s\n"
    return read_report(file, output, time.monotonic() - start_s)


def read_report(file: str, output: str, seconds: float) -> Report:
    counts = [int(one or other) for one, other in _SUMMARY.findall(output)]
    told = [line for line in output.splitlines() if _RESULT.search(line) and " in " in line]
    results = ", ".join(" ".join(pair) for pair in _RESULT.findall(told[-1])) if told else "no result"
    return Report(file, sum(counts) if counts else None, results, seconds, output)


def _text(data: bytes | str | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


def run_all(tool: str, files: Sequence[str], selection: str, at_once: int, timeout_s: float) -> list[Report]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda file: check(tool, file, selection, timeout_s), files))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "synccheck", "initcheck"], default="memcheck")
    parser.add_argument("--files", nargs="+", default=FILES, help="files of tests (default: all of kernels)")
    parser.add_argument("-k", default=SMALL, dest="selection", help="which tests, as pytest's (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=6, help="processes at a time (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one file (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="a folder for the whole outputs")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the path; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    reports = run_all(args.tool, args.files, args.selection, args.at_once, args.timeout_s)
    for report in reports:
        if args.logs is not None:
            args.logs.mkdir(parents=True, exist_ok=True)
            (args.logs / f"{args.tool}-{Path(report.file).stem}.log").write_text(report.output)
        found = "no summary" if report.num_found is None else f"{report.num_found} found"
        print(f"{args.tool:9}  {Path(report.file).stem:24}  {found:12}  {report.results:32}  {report.seconds:5.0f} s")
    return 0 if all(report.is_clean for report in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())
