"""`vllm bench serve` (of vLLM 0.26) that begins together with others: instead of its ready check, it waits for a file.

    python vllm_bench_together.py READY GO bench serve ...

It creates READY when all that is left is the load, and begins once GO exists. So the load of several processes begins
within a few milliseconds, though their imports and prompts take seconds that differ. The last thing before the load is
to ask the server for metrics, which it answers late while others' load is on it: so that is where it waits.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any, Final

POLL_S: Final = 0.005
WAIT_S: Final = 120.0


def main() -> None:
    import vllm.benchmarks.serve as serving
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.entrypoints.cli.main import main as run_vllm

    ready, go = Path(sys.argv[1]), Path(sys.argv[2])

    async def is_there(*_args: Any, **_settings: Any) -> Any:
        return RequestFuncOutput(success=True)

    async def wait_for_go(*_args: Any, **_settings: Any) -> None:
        ready.touch()  # noqa: ASYNC240 - nothing else runs yet
        deadline_s = time.monotonic() + WAIT_S
        while not go.exists():  # noqa: ASYNC240
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the other clients were not ready within {WAIT_S:g} s")
            await asyncio.sleep(POLL_S)

    serving.wait_for_endpoint = is_there
    serving.fetch_diffusion_metrics = wait_for_go
    sys.argv = ["vllm", *sys.argv[3:]]
    run_vllm()


if __name__ == "__main__":
    main()
