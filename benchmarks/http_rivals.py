"""Our service and vLLM's server on one GPU, one after the other, under the same load over HTTP.

    python benchmarks/http_rivals.py --tokenizer DIR --our-path SITE --rival-path VLLM --json OUT [--client vllm]

Both serve the 8B shape with random weights and a vocabulary of 49,152, whose tokenizer `--tokenizer` has (SmolLM2's).
First, unless `--no-mixed`, 64 clients decode while prompts of 8,000 tokens arrive at fixed times; then each number of
`--clients` sends distinct prompts of 1,000 tokens and reads 200. The client is `vllm bench serve`, or ours in several
processes (`--client ours`; always for the mixed load); it is the same for both servers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.http_load import Client, load_figures, mixed_figures, run_clients
from benchmarks.http_servers import MODEL_NAME, Server, our_service, running, vllm_server, write_model
from benchmarks.vllm_clients import VllmLoad, run_vllm_clients
from tensorweave.cli.figures import publish, report
from tensorweave.cli.prompts import random_prompts
from tensorweave.cli.suite_figures import card, markdown_table
from tensorweave.cli.suite_shapes import LLAMA_8B_SMALL_VOCABULARY, SMOLLM2_135M, TINY, ModelShape

TINY_WITH_TOKENIZER = ModelShape({**TINY.config, "vocab_size": 49152})
SHAPES = {"8b": LLAMA_8B_SMALL_VOCABULARY, "smollm2": SMOLLM2_135M, "tiny": TINY_WITH_TOKENIZER}
MAX_SEQ_LEN = 8192
REQUEST_TIMEOUT_S = 240.0
MIN_PROMPTS = 8
MIXED_START_S = 3.0
"""The first long prompt of a mixed load comes when all decodes have begun."""


def measure(server: Server, model_dir: Path, shape: ModelShape, args: argparse.Namespace, deadline_s: float) -> Any:
    log = args.logs / f"{server.name}.log"
    with running(server, log, min(args.start_timeout, deadline_s - time.monotonic())) as started_s:
        print(f"{server.name}: first answer after {started_s:.0f} s", flush=True)
        result: dict[str, Any] = {"started_s": started_s, "rows": [], "left_out": []}
        run_clients(server.url, MODEL_NAME, closed_loop(8, 16, shape, args, seed=99), REQUEST_TIMEOUT_S)  # warm-up
        if args.mixed and time.monotonic() < deadline_s - args.row_reserve:
            clients = mixed_load(shape, args)
            result["mixed"] = mixed_figures(run_clients(server.url, MODEL_NAME, clients, REQUEST_TIMEOUT_S))
            print(f"{server.name}: mixed: {json.dumps(result['mixed'])}", flush=True)
        elif args.mixed:
            result["left_out"].append("mixed load: no time left")
        for num_clients in args.clients:
            if time.monotonic() > deadline_s - args.row_reserve:
                result["left_out"].append(f"{num_clients} clients: no time left")
                continue
            figures = one_row(server, num_clients, model_dir, shape, args)
            result["rows"].append({"clients": num_clients, **figures})
            print(f"{server.name}: {num_clients} clients: {told(figures)}", flush=True)
    return result


def one_row(
    server: Server, num_clients: int, model_dir: Path, shape: ModelShape, args: argparse.Namespace
) -> dict[str, Any]:
    num_prompts = max(MIN_PROMPTS, num_clients * args.prompts_per_client)
    if args.client == "vllm":
        load = VllmLoad(num_clients, num_prompts, args.input_len, args.output_len, args.seed + num_clients)
        return run_vllm_clients(load, server.url, model_dir, args.rival_path, args.per_process, REQUEST_TIMEOUT_S)
    clients = closed_loop(num_clients, num_prompts, shape, args, seed=num_clients)
    return load_figures(run_clients(server.url, MODEL_NAME, clients, REQUEST_TIMEOUT_S))


def closed_loop(
    num_clients: int, num_prompts: int, shape: ModelShape, args: argparse.Namespace, seed: int
) -> list[Client]:
    prompts = random_prompts(num_prompts, args.input_len, shape.vocab_size, args.seed + seed)
    return [Client(prompts[place::num_clients], args.output_len) for place in range(num_clients)]


def mixed_load(shape: ModelShape, args: argparse.Namespace) -> list[Client]:
    short = random_prompts(args.decode_clients, 200, shape.vocab_size, args.seed + 1001)
    long = random_prompts(args.long_prompts, args.long_len, shape.vocab_size, args.seed + 1002)
    decodes = [Client([prompt], args.decode_len, "decode") for prompt in short]
    starts_s = [MIXED_START_S + place * args.long_interval for place in range(args.long_prompts)]
    return decodes + [Client([prompt], 8, "prompt", start_s) for prompt, start_s in zip(long, starts_s, strict=True)]


def told(figures: Mapping[str, Any]) -> str:
    line = f"{figures['output_tok_s']:,.0f} tok/s"
    for kind in ("ttft", "tpot"):
        if times := figures[f"{kind}_ms"]:
            line += f", {kind} {times['median']:.1f} ms (p99 {times['p99']:.1f})"
    failed = figures["num_failed"]
    return line + (f", {failed} FAILED: {figures.get('first_error', '')}" if failed else "")


def tables(sides: Mapping[str, Any]) -> str:
    """Both sides' figures, "ours / rival's (ratio)" where both have them."""
    names = list(sides)
    head = ["clients", "output tok/s", "median TTFT, ms", "median TPOT, ms", "p99 TPOT, ms", "median in all, ms"]
    numbers = list(dict.fromkeys(row["clients"] for side in sides.values() for row in side["rows"]))
    lines = []
    for number in numbers:
        rows = [next((row for row in sides[name]["rows"] if row["clients"] == number), None) for name in names]
        picks = [("output_tok_s", None), ("ttft_ms", "median"), ("tpot_ms", "median"), ("tpot_ms", "p99")]
        picks.append(("e2e_ms", "median"))
        lines.append([str(number), *(pair([picked(row, *pick) for row in rows]) for pick in picks)])
    text = f"{' / '.join(names)} (ratio)\n\n{markdown_table(head, lines)}"
    mixed = [side.get("mixed") for side in sides.values()]
    if any(mixed):
        head = [
            "mixed load",
            "decode tok/s",
            "all tok/s",
            "median gap, ms",
            "p99 gap, ms",
            "longest gap, ms",
            "TTFT, ms",
        ]
        picks = [
            ("decode_tok_s", None),
            ("total_tok_s", None),
            ("gap_ms", "median"),
            ("gap_ms", "p99"),
            ("gap_ms", "max"),
        ]
        picks += [("prompt_ttft_ms", "median")]
        text += f"\n\n{markdown_table(head, [['', *(pair([picked(row, *pick) for row in mixed]) for pick in picks)]])}"
    return text


def picked(figures: Mapping[str, Any] | None, name: str, part: str | None) -> float | None:
    value = (figures or {}).get(name)
    return value if part is None or value is None else value.get(part)


def pair(values: Sequence[float | None]) -> str:
    shown = " / ".join("–" if value is None else f"{value:,.1f}" for value in values)
    if len(values) == 2 and values[0] is not None and values[1]:
        shown += f" ({values[0] / values[1]:.3f})"
    return shown


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    made.add_argument("--sides", nargs="+", choices=("tensorweave", "vllm"), default=["tensorweave", "vllm"])
    made.add_argument("--client", choices=("ours", "vllm"), default="ours", help="(default: %(default)s)")
    made.add_argument("--per-process", type=int, default=64, help="clients of a `vllm bench serve` (default: 64)")
    made.add_argument("--our-path", default="", help="in front of PYTHONPATH of our service")
    made.add_argument("--rival-path", default="", help="the same of vLLM")
    made.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32, 64, 256])
    made.add_argument("--input-len", type=int, default=1000)
    made.add_argument("--output-len", type=int, default=200)
    made.add_argument("--prompts-per-client", type=int, default=4)
    made.add_argument("--mixed", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--decode-clients", type=int, default=64)
    made.add_argument("--decode-len", type=int, default=2000)
    made.add_argument("--long-prompts", type=int, default=15)
    made.add_argument("--long-len", type=int, default=8000)
    made.add_argument("--long-interval", type=float, default=0.6, metavar="S")
    made.add_argument("--limit", type=float, default=560.0, metavar="S", help="of the whole (default: %(default)s)")
    made.add_argument("--start-timeout", type=float, default=240.0, metavar="S")
    made.add_argument("--row-reserve", type=float, default=40.0, metavar="S", help="start no row with less time left")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="of our service")
    made.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="where the servers' logs go")
    made.add_argument("--json", type=Path)
    return made


def main() -> int:
    args = parser().parse_args()
    began_s = time.monotonic()
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[args.shape]
        model_dir = write_model(Path(folder) / "model", shape, args.dtype, args.tokenizer)
        engine = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 512, "max_num_tokens": MAX_SEQ_LEN}
        made = {
            "tensorweave": our_service(model_dir, args.dtype, engine, args.changes, args.our_path),
            "vllm": vllm_server(model_dir, args.dtype, MAX_SEQ_LEN, args.rival_path),
        }
        for place, name in enumerate(args.sides, start=1):
            deadline_s = began_s + args.limit * place / len(args.sides)
            sides[name] = measure(made[name], model_dir, shape, args, deadline_s)
            settings = {key: value for key, value in vars(args).items() if key not in ("json", "logs")}
            variables = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
            figures = {"card": card(), "environment": variables, "runs": sides}
            publish(report("http_rivals", settings, figures), args.json)
    print(tables(sides))
    return 0 if all(not row["num_failed"] for side in sides.values() for row in side["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
