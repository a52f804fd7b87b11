"""Our service and vLLM's server under the same load from `vllm bench serve`, in turns in one run.

    tensorweave serve --config deploy/examples/laptop_aggregated.yaml &
    python benchmarks/duel_http.py --model DIR --rival-python VENV/bin/python --served-name smollm2-135m-instruct

Starts the rival's server itself (or takes `--rival-url`), and expects ours at `--url`. Both stay up; only one has load
at a time, and who goes first alternates. Every turn has prompts of its own, so that no cached prefix helps.
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
TURN_TIMEOUT_S = 900.0


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, **offline}


@contextmanager
def rival_server(args: argparse.Namespace) -> Iterator[str]:
    if args.rival_url:
        yield args.rival_url
        return
    url = f"http://127.0.0.1:{args.rival_port}"
    command = [vllm(args), "serve", str(args.model), "--served-model-name", args.served_name, "--host", "127.0.0.1"]
    command += ["--port", str(args.rival_port), "--dtype", args.dtype, "--max-model-len", "2048"]
    command += ["--max-num-seqs", "16", "--no-enable-prefix-caching"]
    output = None if args.verbose else subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready(url):
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the rival's server did not start; --verbose shows why")
            time.sleep(0.5)  # there is nothing of it to wait on
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


def vllm(args: argparse.Namespace) -> str:
    return str(Path(args.rival_python).parent / "vllm")


def load(url: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """One run of the rival's own load generator."""
    with tempfile.TemporaryDirectory() as folder:
        command = [vllm(args), "bench", "serve", "--backend", "openai", "--base-url", url]
        command += ["--endpoint", "/v1/completions", "--model", args.served_name, "--tokenizer", str(args.model)]
        command += ["--dataset-name", "random", "--random-input-len", str(args.input_len)]
        command += ["--random-output-len", str(args.output_len), "--num-prompts", str(args.num_prompts)]
        command += ["--max-concurrency", str(args.concurrency), "--ignore-eos", "--seed", str(seed)]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        output = None if args.verbose else subprocess.DEVNULL
        subprocess.run(
            command, env=environment(), stdout=output, stderr=output, check=True, timeout=TURN_TIMEOUT_S, cwd=folder
        )
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    if result["completed"] != args.num_prompts:
        raise RuntimeError(f"{url} answered {result['completed']} of {args.num_prompts} requests")
    return {name: float(result[name]) for name in FIGURES}


def fight(urls: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for name, url in urls.items():
        load(url, 1000 + len(name), args)
    for turn in range(args.rounds):
        for name in list(urls) if turn % 2 == 0 else list(reversed(urls)):
            turns[name].append(load(urls[name], 2 * turn + (name == "vllm"), args))
            figures = "  ".join(f"{key} {value:.1f}" for key, value in turns[name][-1].items())
            print(f"{name:>12}  {figures}", flush=True)
    medians = {
        name: {key: statistics.median(turn[key] for turn in all_turns) for key in FIGURES}
        for name, all_turns in turns.items()
    }
    ratios = {f"{key}_ratio": medians["tensorweave"][key] / medians["vllm"][key] for key in FIGURES}
    return {**medians, **ratios, "runs": turns}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--rival-python", required=True, help="interpreter that has vllm")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="our service (default: %(default)s)")
    parser.add_argument("--rival-url", help="a server of the rival that is up already")
    parser.add_argument("--rival-port", type=int, default=8001, help="(default: %(default)s)")
    parser.add_argument("--served-name", required=True, help="the model's name in our service, and in the rival's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the rival's server")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of turns (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what server and load generator print")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not is_ready(args.url):
        parser.error(f"no service answers at {args.url}")
    with rival_server(args) as rival_url:
        figures = fight({"tensorweave": args.url, "vllm": rival_url}, args)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "verbose", "rival_python")}
    publish(report("duel_http", {**settings, "model": args.model.name}, figures), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
