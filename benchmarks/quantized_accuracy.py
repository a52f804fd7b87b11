"""Perplexity of a text, and how often the most likely token is that of the unquantized model.

    python benchmarks/quantized_accuracy.py MODEL TEXT [--tokens 3072] [--algorithms none W8A16 W4A16:32 ...]

MODEL is a name or directory, TEXT a file. An algorithm is a `QuantAlgo`, perhaps with a group size and minimums, as in
W4A16:64 or W4A16:64:min. The text is cut into prompts of `--window` tokens, each read alone; its first token is not
counted. All else is in `--dtype`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorweave import LLM, SamplingParams


@dataclass(frozen=True, slots=True)
class Reading:
    """Of each counted token: its log-probability, and the most likely token in its place."""

    logprobs: list[float]
    likeliest: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def agreement(self, other: Reading) -> float:
        """Share of places with the same most likely token."""
        same = sum(a == b for a, b in zip(self.likeliest, other.likeliest, strict=True))
        return same / len(self.likeliest)


def read(model: str, dtype: str, algorithm: str, windows: Sequence[Sequence[int]]) -> Reading:
    knobs: dict[str, Any] = {"dtype": dtype, "kv_cache_config": {"max_tokens": 8192}}
    if algorithm != "none":
        name, *group = algorithm.split(":")
        size = int(group[0]) if group else None
        knobs["quant_config"] = {"quant_algo": name, "group_size": size, "has_zero_point": group[1:] == ["min"]}
    reading = Reading([], [])
    with LLM(model=model, **knobs) as llm:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        for window, output in zip(windows, llm.generate([list(each) for each in windows], params), strict=True):
            places = output.outputs[0].prompt_logprobs
            for token, place in zip(window[1:], places[-(len(window) - 1) :], strict=True):
                reading.logprobs.append(place[token].logprob)
                reading.likeliest.append(max(place, key=lambda each: place[each].logprob))
    return reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--algorithms", nargs="+", default=["none", "W8A16", "W4A16"])
    args = parser.parse_args()
    with LLM(model=args.model, dtype=args.dtype, kv_cache_config={"max_tokens": 512}) as llm:
        tokens = llm.tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.tokens]
    windows = [tokens[first : first + args.window] for first in range(0, len(tokens), args.window)]
    readings: dict[str, Reading] = {}
    for algorithm in args.algorithms:
        reading = readings[algorithm] = read(args.model, args.dtype, algorithm, windows)
        agreement = reading.agreement(next(iter(readings.values())))
        print(f"{algorithm:30} perplexity {reading.perplexity:8.3f}   same token {agreement:7.2%}", flush=True)


if __name__ == "__main__":
    main()
