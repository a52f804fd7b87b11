"""`vllm bench serve` as the client of an HTTP comparison, in one or more processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.http_servers import MODEL_NAME
from tensorweave.cli.figures import percentile

_TOGETHER: Final = Path(__file__).with_name("vllm_bench_together.py")


class VllmLoad(NamedTuple):
    """Prompts are of its own making and follow the seed."""

    num_clients: int
    num_prompts: int
    input_len: int
    output_len: int
    seed: int

    def split(self, num_parts: int) -> list[VllmLoad]:
        """The load of each process."""

        def share(number: int, place: int) -> int:
            return number // num_parts + (place < number % num_parts)

        return [
            self._replace(
                num_clients=share(self.num_clients, place),
                num_prompts=share(self.num_prompts, place),
                seed=self.seed + 1000 * place,
            )
            for place in range(num_parts)
        ]


def run_vllm_clients(
    load: VllmLoad, url: str, tokenizer: Path, vllm_path: str, most_per_process: int, timeout_s: float
) -> dict[str, Any]:
    """Run the load and wait for its figures.

    Args:
        vllm_path: where vLLM is installed, for PYTHONPATH.
        most_per_process: clients of one process. One reads about 10,000 events a second, and beyond that it is what is
            measured.
    """
    loads = load.split(-(-load.num_clients // most_per_process))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{place}.json" for place in range(len(loads))]
        ready = [Path(folder) / f"{place}.ready" for place in range(len(loads))]
        go = Path(folder) / "go"
        environment = {**os.environ, "PYTHONPATH": vllm_path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        runs = [
            subprocess.Popen(
                [sys.executable, str(_TOGETHER), str(mine), str(go), *_arguments(each, url, tokenizer, file)],
                env=environment,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for each, file, mine in zip(loads, files, ready, strict=True)
        ]
        try:
            _await_all(ready, runs, timeout_s)
            go.touch()
            for run in runs:
                _, problem = run.communicate(timeout=timeout_s)
                if run.returncode:
                    raise RuntimeError(f"vllm bench serve failed:\n{problem[-2000:]}")
        finally:
            for run in runs:
                run.kill()
        return from_vllm([json.loads(file.read_text("utf-8")) for file in files], load.num_prompts)


def _await_all(files: Sequence[Path], runs: Sequence[subprocess.Popen[str]], timeout_s: float) -> None:
    """Return when all files exist, or when one of the processes has ended, whose failure its reader tells."""
    deadline_s = time.monotonic() + timeout_s
    while not all(file.exists() for file in files) and all(run.poll() is None for run in runs):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the clients were not ready within {timeout_s:g} s")
        time.sleep(0.01)


def _arguments(load: VllmLoad, url: str, tokenizer: Path, file: Path) -> list[str]:
    command = ["bench", "serve", "--backend", "openai"]
    command += ["--base-url", url, "--endpoint", "/v1/completions", "--model", MODEL_NAME]
    command += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
    command += ["--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len)]
    command += ["--num-prompts", str(load.num_prompts), "--max-concurrency", str(load.num_clients)]
    command += ["--seed", str(load.seed), "--save-result", "--save-detailed"]
    return [*command, "--result-dir", str(file.parent), "--result-filename", file.name]


def from_vllm(results: Sequence[Mapping[str, Any]], num_prompts: int) -> dict[str, Any]:
    """The figures of all processes together, under our names. Each result has the times of its requests in seconds
    (`--save-detailed`), on a clock that all processes share. The rate counts from the first start to the last end."""
    ttfts_s, tpots_s, gaps_s, totals_s, ends_s = [], [], [], [], []
    num_tokens_of_all = 0
    for result in results:
        names = ("start_times", "ttfts", "itls", "output_lens", "errors")
        for start_s, ttft_s, gaps, num_tokens, error in zip(*(result[name] for name in names), strict=True):
            if error:
                continue
            ttfts_s.append(ttft_s)
            gaps_s += gaps
            totals_s.append(ttft_s + sum(gaps))
            ends_s.append(start_s + totals_s[-1])
            num_tokens_of_all += num_tokens
            if num_tokens > 1:
                tpots_s.append(sum(gaps) / (num_tokens - 1))
    answered = sum(result["completed"] for result in results)
    firsts_s = [min(result["start_times"]) for result in results]
    elapsed_s = max(ends_s, default=min(firsts_s)) - min(firsts_s)
    return {
        "num_answered": answered,
        "num_failed": num_prompts - answered,
        "num_client_processes": len(results),
        "begun_within_s": max(firsts_s) - min(firsts_s),
        "elapsed_s": elapsed_s,
        "output_tok_s": num_tokens_of_all / elapsed_s if elapsed_s else 0.0,
        "ttft_ms": _milliseconds(ttfts_s),
        "tpot_ms": _milliseconds(tpots_s),
        "itl_ms": _milliseconds(gaps_s),
        "e2e_ms": _milliseconds(totals_s),
    }


def _milliseconds(times_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {"median": 1e3 * percentile(ordered, 50), "p99": 1e3 * percentile(ordered, 99)}
