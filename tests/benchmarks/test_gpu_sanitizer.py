"""What `benchmarks/gpu_sanitizer.py` makes of the output of compute-sanitizer and pytest."""

from __future__ import annotations

import pytest

from benchmarks.gpu_sanitizer import read_report

CLEAN = "========= COMPUTE-SANITIZER\n....\n4 passed, 29 deselected in 14.1s\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "num_found", "results", "is_clean"),
    [
        (CLEAN, 0, "4 passed", True),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"), 0, "4 passed", True),
        (CLEAN.replace("SUMMARY: 0 errors", "SUMMARY: 3 errors"), 3, "4 passed", False),
        (CLEAN.replace("4 passed", "1 failed, 3 passed"), 0, "1 failed, 3 passed", False),
        (CLEAN.replace("4 passed", "2 skipped"), 0, "2 skipped", False),
        ("========= COMPUTE-SANITIZER\n...\nended after 125 s\n", None, "no result", False),
    ],
)
def test_only_a_whole_run_without_findings_is_clean(
    output: str, num_found: int | None, results: str, is_clean: bool
) -> None:
    report = read_report("tests/x.py", output, 1.0)
    assert (report.num_found, report.results, report.is_clean) == (num_found, results, is_clean)
