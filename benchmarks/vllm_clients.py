"""`vllm bench serve` as the client of an HTTP comparison, in one or more processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.http_servers import MODEL_NAME
from tensorweave.cli.figures import percentile


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
        environment = {**os.environ, "PYTHONPATH": vllm_path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        runs = [
            subprocess.Popen(
                _command(each, url, tokenizer, file),
                env=environment,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for each, file in zip(loads, files, strict=True)
        ]
        try:
            for run in runs:
                _, problem = run.communicate(timeout=timeout_s)
                if run.returncode:
                    raise RuntimeError(f"vllm bench serve failed:\n{problem[-2000:]}")
        finally:
            for run in runs:
                run.kill()
        return from_vllm([json.loads(file.read_text("utf-8")) for file in files], load.num_prompts)


def _command(load: VllmLoad, url: str, tokenizer: Path, file: Path) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", url, "--endpoint", "/v1/completions", "--model", MODEL_NAME]
    command += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
    command += ["--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len)]
    command += ["--num-prompts", str(load.num_prompts), "--max-concurrency", str(load.num_clients)]
    command += ["--seed", str(load.seed), "--save-result", "--save-detailed"]
    return [*command, "--result-dir", str(file.parent), "--result-filename", file.name]


def from_vllm(results: Sequence[Mapping[str, Any]], num_prompts: int) -> dict[str, Any]:
    """The figures of all processes together, under our names. Each result has the times of its requests in seconds
    (`--save-detailed`). The rate is the sum of the processes' rates."""
    ttfts_s, tpots_s, gaps_s, totals_s = [], [], [], []
    for result in results:
        for ttft_s, gaps, num_tokens, error in zip(
            result["ttfts"], result["itls"], result["output_lens"], result["errors"], strict=True
        ):
            if error:
                continue
            ttfts_s.append(ttft_s)
            gaps_s += gaps
            totals_s.append(ttft_s + sum(gaps))
            if num_tokens > 1:
                tpots_s.append(sum(gaps) / (num_tokens - 1))
    answered = sum(result["completed"] for result in results)
    return {
        "num_answered": answered,
        "num_failed": num_prompts - answered,
        "num_client_processes": len(results),
        "elapsed_s": max(result["duration"] for result in results),
        "output_tok_s": sum(result["output_throughput"] for result in results),
        "ttft_ms": _milliseconds(ttfts_s),
        "tpot_ms": _milliseconds(tpots_s),
        "itl_ms": _milliseconds(gaps_s),
        "e2e_ms": _milliseconds(totals_s),
    }


def _milliseconds(times_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {"median": 1e3 * percentile(ordered, 50), "p99": 1e3 * percentile(ordered, 99)}
