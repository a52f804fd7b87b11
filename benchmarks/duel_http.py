"""Our service and vLLM's server under the same load from `vllm bench serve`, in alternation in one run.

    tensorweave serve --config deploy/examples/laptop_aggregated.yaml &
    python benchmarks/duel_http.py --model DIR --vllm-python VENV/bin/python --served-name smollm2-135m-instruct

Starts vLLM's server itself (or takes `--vllm-url`), and expects ours at `--url`. Both stay up; only one has load at a
time, and which one goes first alternates. Every run has prompts of its own, so that no cached prefix helps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.figures import publish, report

FIGURES = ("output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "p99_itl_ms")
START_TIMEOUT_S = 300.0
LOAD_TIMEOUT_S = 900.0


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, **offline}


@contextmanager
def vllm_server(args: argparse.Namespace) -> Iterator[str]:
    if args.vllm_url:
        yield args.vllm_url
        return
    url = f"http://127.0.0.1:{args.vllm_port}"
    command = [
        vllm_command(args),
        "serve",
        str(args.model),
        "--served-model-name",
        args.served_name,
        "--host",
        "127.0.0.1",
    ]
    command += ["--port", str(args.vllm_port), "--dtype", args.dtype, "--max-model-len", "2048"]
    command += ["--max-num-seqs", "16", "--no-enable-prefix-caching"]
    output = None if args.verbose else subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready(url):
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("vLLM's server did not start; --verbose shows why")
            time.sleep(0.5)  # it offers nothing to wait on
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


def vllm_command(args: argparse.Namespace) -> str:
    return str(Path(args.vllm_python).parent / "vllm")


def load(url: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Run vLLM's load generator once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [vllm_command(args), "bench", "serve", "--backend", "openai", "--base-url", url]
        command += ["--endpoint", "/v1/completions", "--model", args.served_name, "--tokenizer", str(args.model)]
        command += ["--dataset-name", "random", "--random-input-len", str(args.input_len)]
        command += ["--random-output-len", str(args.output_len), "--num-prompts", str(args.num_prompts)]
        command += ["--max-concurrency", str(args.concurrency), "--ignore-eos", "--seed", str(seed)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        output = None if args.verbose else subprocess.DEVNULL
        subprocess.run(
            command, env=environment(), stdout=output, stderr=output, check=True, timeout=LOAD_TIMEOUT_S, cwd=folder
        )
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if result["completed"] != args.num_prompts:
        raise RuntimeError(f"{url} answered {result['completed']} of {args.num_prompts} requests")
    return {name: float(result[name]) for name in FIGURES}


def compare(urls: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for name, url in urls.items():
        load(url, 1000 + len(name), args)
    for number in range(args.rounds):
        for name in list(urls) if number % 2 == 0 else list(reversed(urls)):
            runs[name].append(load(urls[name], 2 * number + (name == "vllm"), args))
            figures = "  ".join(f"{key} {value:.1f}" for key, value in runs[name][-1].items())
            print(f"{name:>12}  {figures}", flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in all_runs) for key in FIGURES}
        for name, all_runs in runs.items()
    }
    ratios = {f"{key}_ratio": medians["tensorweave"][key] / medians["vllm"][key] for key in FIGURES}
    return {**medians, **ratios, "runs": runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--vllm-python", required=True, help="interpreter that has vllm")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="our service (default: %(default)s)")
    parser.add_argument("--vllm-url", help="a vLLM server that is up already")
    parser.add_argument("--vllm-port", type=int, default=8001, help="(default: %(default)s)")
    parser.add_argument("--served-name", required=True, help="the model's name in our service, and in vLLM's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of vLLM's server")
    parser.add_argument("--rounds", type=int, default=3, help="runs per server (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what server and load generator print")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not is_ready(args.url):
        parser.error(f"no service answers at {args.url}")
    with vllm_server(args) as vllm_url:
        figures = compare({"tensorweave": args.url, "vllm": vllm_url}, args)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "verbose", "vllm_python")}
    publish(report("duel_http", {**settings, "model": args.model.name}, figures), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
