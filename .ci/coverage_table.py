"""Prints which share of each room's lines `make test COVERAGE=1` has run, from the data that pytest-cov has left."""

from __future__ import annotations

import io

from coverage import Coverage
from line_table import ROOMS

WHAT = "lines run in the processes of pytest by the unit tests: none marked slow or model, none of Hypothesis"


def main() -> None:
    coverage = Coverage()
    coverage.load()
    print(f"coverage: {WHAT}")
    for room in ROOMS:
        print(f"{room:<20}{coverage.report(file=io.StringIO(), include=[f'{room}/*']):>6.1f} %")
    print(f"{'all':<20}{coverage.report(file=io.StringIO()):>6.1f} %")


if __name__ == "__main__":
    main()
