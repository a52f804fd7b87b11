"""Wait until the job's Ray cluster (RAY_ADDRESS) has the given number of live nodes; exit 1 after five minutes."""

from __future__ import annotations

import logging
import sys
import time

import ray

TIMEOUT_S = 300.0


def main(wanted: int) -> int:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if not ray.is_initialized():
                ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
            alive = sum(node["Alive"] for node in ray.nodes())
        except ConnectionError:
            alive = 0
        if alive >= wanted:
            return 0
        if time.monotonic() > deadline_s:
            print(f"{alive} of {wanted} nodes joined Ray within {TIMEOUT_S:g} s", file=sys.stderr)
            return 1
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
