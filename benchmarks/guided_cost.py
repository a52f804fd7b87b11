"""What a grammar costs: tokens per second of JSON answers against the same requests without a grammar, in one run.

    python benchmarks/guided_cost.py --model smollm2-135m-instruct --batch 1 16 64 --json cost.json

Both are asked in alternation, for the same number of tokens, at temperature 1; the schema never ends within it. A
`ratio` is the median over the rounds of the two neighbours' ratio, and `processor_ratio` the same of tokens per second
of processor time, in which other processes on the machine hardly show. `host_us` is the median time that the step
loop's thread spends on the grammars of one step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave import LLM, GuidedDecodingParams, SamplingParams
from tensorweave.workers.sampling.decoder import SamplingDecoder

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}
PROMPT = "A list of people as JSON, each with name, age and tags: "


class Rates(NamedTuple):
    """Tokens per second of time, and of processor time."""

    wall: float
    processor: float


def main() -> None:
    args = _arguments()
    rows = []
    with LLM(args.model, dtype=args.dtype, guided_decoding_backend=args.backend) as llm:
        guide = GuidedDecodingParams(json=SCHEMA)
        _generate(llm, 1, 8, guide)  # compiles the grammar
        for batch in args.batch:
            row = _measure(llm, batch, args.tokens, args.rounds, guide)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"backend": args.backend, "rows": rows}, indent=1), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto", choices=["auto", "xgrammar", "llguidance"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _measure(llm: LLM, batch: int, tokens: int, rounds: int, guide: GuidedDecodingParams) -> dict[str, Any]:
    free, guided, edits_s = list[Rates](), list[Rates](), list[float]()
    for number in range(rounds):
        for variant in (None, guide) if number % 2 else (guide, None):
            with _timed_edits(edits_s if variant else []):
                rates = _generate(llm, batch, tokens, variant)
            (free if variant is None else guided).append(rates)
    ratios = [one.wall / other.wall for one, other in zip(guided, free, strict=True)]
    free_rate = statistics.median(rates.wall for rates in free)
    return {
        "batch": batch,
        "free_tokens_per_s": round(free_rate, 1),
        "guided_tokens_per_s": round(statistics.median(rates.wall for rates in guided), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "processor_ratio": round(
            statistics.median(one.processor / other.processor for one, other in zip(guided, free, strict=True)), 3
        ),
        "host_us": round(1e6 * statistics.median(edits_s)),
        "free_step_us": round(1e6 * batch / free_rate),
    }


def _generate(llm: LLM, batch: int, tokens: int, guide: GuidedDecodingParams | None) -> Rates:
    params = [
        SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=guide is None, guided_decoding=guide)
        for seed in range(batch)
    ]
    started_s, started_processor_s = time.perf_counter(), time.process_time()
    outputs = llm.generate([PROMPT] * batch, params, use_tqdm=False)
    elapsed_s, processor_s = time.perf_counter() - started_s, time.process_time() - started_processor_s
    assert isinstance(outputs, list)
    num_tokens = sum(output.outputs[0].length for output in outputs)
    assert num_tokens == batch * tokens, "an answer has ended"
    return Rates(num_tokens / elapsed_s, num_tokens / processor_s)


@contextmanager
def _timed_edits(into: list[float]) -> Iterator[None]:
    """Note the processor time of each call that edits logits."""
    edit: Callable[..., Any] = SamplingDecoder._edit

    def timed(*arguments: Any) -> Any:
        started_s = time.thread_time()
        try:
            return edit(*arguments)
        finally:
            into.append(time.thread_time() - started_s)

    SamplingDecoder._edit = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        SamplingDecoder._edit = edit  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
