"""From the start of a process to its first token, part by part: a model of Llama-3.1-8B's shape on one GPU.

    python benchmarks/cold_start.py [--directory /tmp/llama8b] [--json out.json] [--set engine_key=value ...]

Each row is a new process: random weights made on the GPU, with an empty cache of compiled kernels and then with the one
that this has left; and, if the directory has a checkpoint (load_weights.py writes one), weights from files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

TIMEOUT_S = 600.0


def start(directory: Path, load_format: str, settings: dict[str, Any], began_s: float) -> dict[str, float]:
    """In the new process. `began_s` is when it was started, on this host's clock."""
    seconds: dict[str, float] = {}

    class Parts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            name, elapsed_s = record.args  # type: ignore[misc]
            seconds[str(name)] = float(elapsed_s)  # type: ignore[arg-type]

    parts = logging.getLogger("tensorweave.workers.start_log")
    parts.setLevel(logging.INFO)
    parts.addHandler(Parts())
    import torch

    from tensorweave import LLM, SamplingParams

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    seconds["importing"] = time.time() - began_s
    with LLM(directory, load_format=load_format, skip_tokenizer_init=True, **settings) as llm:
        is_ready_s = time.time()
        llm.generate([list(range(1, 129))], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        ended_s = time.time()
        seconds["rest of the start"] = is_ready_s - began_s - sum(seconds.values())
        seconds["first token of 128"] = ended_s - is_ready_s
        seconds["total"] = ended_s - began_s
    return seconds


def run_row(directory: Path, load_format: str, cache: str, settings: list[str]) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--directory", str(directory), "--child", load_format, "--began"]
    command += [repr(time.time()), *(word for each in settings for word in ("--set", each))]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"a start with load_format {load_format} failed, see above")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "llama8b")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], help="an argument of LLM, as max_batch_size=256")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    directory: Path = options.directory
    if options.child:
        settings = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in options.set)}
        print(json.dumps(start(directory, options.child, settings, options.began)))
        return
    from tensorweave.cli.suite_shapes import LLAMA_8B

    directory.mkdir(parents=True, exist_ok=True)
    LLAMA_8B.write(directory, "bfloat16")
    rows = [("random weights, no kernels cached", "dummy"), ("random weights, kernels cached", "dummy")]
    if any(directory.glob("*.safetensors")):
        rows.append(("weights from files, kernels cached", "auto"))
    figures = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, load_format in rows:
            figures[name] = run_row(directory, load_format, cache, options.set)
            print(f"{name}: " + ", ".join(f"{key} {value:.2f} s" for key, value in figures[name].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
