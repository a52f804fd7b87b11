"""`tensorweave bench`: the benchmarks' command lines. `--json FILE` takes figures, settings and machine of each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tensorweave.cli import (
    bench_engine,
    bench_goodput,
    bench_http,
    bench_link,
    bench_steps,
    bench_suite,
    bench_transfer,
)
from tensorweave.cli.arguments import add_api_key, add_changes, count, positive, rate
from tensorweave.cli.suite_rows import SUITES
from tensorweave.cli.suite_run import add_quantization, add_suite_arguments

_EXAMPLES = """\
examples:
  tensorweave bench throughput --model smollm2 --input-len 128 --output-len 64 --dtype float32 --json out.json
  tensorweave bench latency --model smollm2 --batch-size 1
  tensorweave bench suite h100-8b --json out.json --plot out.svg      rows of a table, with the roofline of each
  tensorweave bench trace --model smollm2 --batch-sizes 1 64     where the time of a decode step goes
  tensorweave bench serve --url http://127.0.0.1:8000 --num-prompts 64 --concurrency 8     any OpenAI endpoint
  tensorweave bench link --url http://127.0.0.1:8000     HTTP's share of the time to first token
  tensorweave bench overhead                             the step loop with an empty model
  tensorweave bench transfer                             KV between two ranks, by transport and size
  tensorweave bench ttft --model smollm2                 what handing a prompt over costs, by its length
  tensorweave bench goodput --model smollm2 --plot x.svg  requests within limits, prefill apart and not
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the engine or a service",
        description="Measure the engine or a service.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="benchmarks", metavar="KIND", required=True)
    _add_throughput(kinds)
    _add_latency(kinds)
    _add_suite(kinds)
    _add_trace(kinds)
    _add_serve(kinds)
    _add_link(kinds)
    _add_overhead(kinds)
    _add_transfer(kinds)
    _add_ttft(kinds)
    bench_goodput.add_goodput(kinds)


def _add_throughput(kinds: Any) -> None:
    parser = kinds.add_parser("throughput", help="tokens per second of the engine, all requests at once")
    _engine_arguments(parser)
    parser.add_argument("--num-prompts", type=positive, default=16, help="requests of a run (default: %(default)s)")
    parser.add_argument("--num-runs", type=positive, default=3, help="the median run counts (default: %(default)s)")
    parser.set_defaults(run=bench_engine.run_throughput)


def _add_latency(kinds: Any) -> None:
    parser = kinds.add_parser("latency", help="time to first token and per token of the engine")
    _engine_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=1, help="requests at once (default: %(default)s)")
    parser.add_argument("--num-iters", type=positive, default=10, help="batches that count (default: %(default)s)")
    parser.add_argument("--num-warmups", type=count, default=2, help="batches before those (default: %(default)s)")
    parser.set_defaults(run=bench_engine.run_latency)


def _add_suite(kinds: Any) -> None:
    parser = kinds.add_parser(
        "suite",
        help="rows of requests of given shapes, with random weights",
        description="Run the rows of a suite, and print the rate of each and its share of the roofline.",
    )
    add_suite_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write bars of the shares here, as SVG")
    add_changes(parser, "another argument of LLM, for example max_batch_size=256")
    parser.set_defaults(run=bench_suite.run)


def _add_trace(kinds: Any) -> None:
    parser = kinds.add_parser("trace", help="where the time of a decode step goes: the GPU, the host, each kernel")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="directory, hub id or smollm2")
    which.add_argument("--suite", choices=tuple(SUITES), help="random weights and arguments of this suite")
    add_quantization(parser)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float16", "bfloat16", "float32"), help="of --model"
    )
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 64, 256], help="default: 1 64 256")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="whole rows of the suite in place of decode steps")
    parser.add_argument("--input-len", type=positive, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument(
        "--output-len", type=positive, default=768, help="most generated tokens: longer than the trace takes"
    )
    parser.add_argument("--num-steps", type=positive, default=64, help="steps of a trace (default: %(default)s)")
    parser.add_argument("--top", type=positive, default=15, help="kernels in the table (default: %(default)s)")
    parser.add_argument("--chrome", type=Path, metavar="OUT", help="also write OUT-bN.json for chrome://tracing")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    add_changes(parser, "another argument of LLM")
    _json_argument(parser)
    parser.set_defaults(run=_run_trace)


def _add_serve(kinds: Any) -> None:
    parser = kinds.add_parser("serve", help="load on a running OpenAI endpoint")
    _http_arguments(parser)
    _length_arguments(parser)
    parser.add_argument("--model", help="model name (default: the first that the endpoint lists)")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--num-prompts", type=positive, default=32, help="requests (default: %(default)s)")
    parser.add_argument("--concurrency", type=positive, default=8, help="most requests at once (default: %(default)s)")
    parser.add_argument(
        "--request-rate", type=rate, default=float("inf"), help="arrivals per second, Poisson (default: all at once)"
    )
    parser.add_argument(
        "--num-warmups", type=count, default=1, help="requests before the clock starts (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", help="model directory, name or hub id whose vocabulary the prompts use")
    parser.add_argument(
        "--vocab-size", type=positive, default=32000, help="where no tokenizer is given (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--stop-at-eos", action="store_true", help="let answers end before --output-len")
    parser.set_defaults(run=bench_http.run_serve)


def _add_link(kinds: Any) -> None:
    parser = kinds.add_parser("link", help="time to first token over HTTP less the same in process")
    _http_arguments(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration that the service runs with")
    parser.add_argument("--model", help="short for --set model=…")
    add_changes(parser, "change a key of it")
    parser.add_argument(
        "--num-prompts", type=positive, default=100, help="prompts, each sent both ways (default: %(default)s)"
    )
    parser.add_argument("--num-warmups", type=count, default=5, help="prompts before those (default: %(default)s)")
    parser.add_argument("--num-words", type=positive, default=32, help="length of a prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=positive, default=2, help="tokens to generate (default: %(default)s)")
    parser.set_defaults(run=bench_link.run_link)


def _add_overhead(kinds: Any) -> None:
    parser = kinds.add_parser("overhead", help="a step of the executor outside the forward, with an empty model")
    sizes = [1, 4, 16, 64, 128, 256]
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=sizes, help="default: 1 4 16 64 128 256")
    parser.add_argument("--input-len", type=positive, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--num-steps", type=positive, default=256, help="decode steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device-ms", type=float, default=0.0, help="also: steps a second over a device that takes this long for each"
    )
    _json_argument(parser)
    parser.set_defaults(run=bench_steps.run_overhead)


def _add_transfer(kinds: Any) -> None:
    parser = kinds.add_parser("transfer", help="KV blocks between two ranks of this machine")
    parser.add_argument(
        "--shapes", nargs="+", choices=("smollm2-135m", "llama-8b"), help="KV of these models (default: all)"
    )
    parser.add_argument(
        "--transports",
        nargs="+",
        choices=("ipc", "nccl", "tcp", "ipc_direct"),
        help="(default: all that the machine has, but ipc_direct)",
    )
    parser.add_argument("--sizes", nargs="+", type=positive, default=[4, 64], help="MiB of a fetch (default: 4 64)")
    parser.add_argument(
        "--messages", nargs="+", type=positive, default=[64], help="MiB packed together between GPUs (default: 64)"
    )
    parser.add_argument("--num-runs", type=positive, default=5, help="the median run counts (default: %(default)s)")
    _json_argument(parser)
    parser.set_defaults(run=bench_transfer.run_transfer)


def _add_ttft(kinds: Any) -> None:
    parser = kinds.add_parser("ttft", help="time to first token, prefilled by another gang against the same one")
    _model_arguments(parser)
    lengths = [16, 64, 256, 1024, 4000]
    parser.add_argument("--input-lens", type=positive, nargs="+", default=lengths, help="default: 16 64 256 1024 4000")
    parser.add_argument("--num-prompts", type=positive, default=10, help="of each length (default: %(default)s)")
    parser.set_defaults(run=_run_ttft, tensor_parallel_size=1)


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument(
        "--tensor-parallel-size", type=positive, default=1, metavar="N", help="ranks (default: %(default)s)"
    )
    _length_arguments(parser)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="directory, hub id or smollm2")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float16", "bfloat16", "float32"))
    add_changes(parser, "another argument of LLM, for example kv_cache_config.max_tokens=8192")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    _json_argument(parser)


def _http_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the service (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest request, in seconds")
    add_api_key(parser)
    _json_argument(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")


def _length_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-len", type=positive, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=positive, default=64, help="generated tokens (default: %(default)s)")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the whole report here")


def _run_trace(args: argparse.Namespace) -> int:
    from tensorweave.cli.bench_trace import run

    return run(args)


def _run_ttft(args: argparse.Namespace) -> int:
    from tensorweave.cli.bench_ttft import run_ttft

    return run_ttft(args)
