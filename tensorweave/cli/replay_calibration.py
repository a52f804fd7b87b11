"""A `CostModel` from the steps of a real engine: prompts of several lengths, then batches of several sizes that
decode, alone and beside prompts."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tensorweave.cli.prompts import random_prompts
from tensorweave.cli.suite_shapes import ModelShape
from tensorweave.workers.fakes.simulated_gang import CostModel
from tensorweave.workers.store.disk import writing_into
from tensorweave.workers.store.model_store import resolve_model

if TYPE_CHECKING:
    from tensorweave import LLM

_PROMPT_LENGTHS: Final = (16, 64, 256, 512, 1024)
_BATCHES: Final = ((1, 32), (2, 256), (4, 64), (8, 128), (16, 64), (32, 32), (6, 340))
"""(requests, prompt tokens of each)"""
_OUTPUT_LEN: Final = 24
_ROUNDS: Final = 3
_FIELDS: Final = [field.name for field in dataclasses.fields(CostModel)]
Features = tuple[float, float, float, float, float]
Row = tuple[Features, float]
"""A step's features, as of `step_features`, and its seconds."""


def calibrate(model: str, options: dict[str, Any]) -> tuple[CostModel, dict[str, float]]:
    """The fitted model, and its error over the steps that it was fitted to."""
    from tensorweave import LLM

    model_dir = resolve_model(model)
    vocab_size = ModelShape.read(model_dir).vocab_size
    with LLM(model=model_dir, skip_tokenizer_init=True, **options) as llm:
        rows: list[Row] = []
        _steps(llm, random_prompts(1, 256, vocab_size, 0), 2)  # the first steps of an engine are slow
        for seed in range(_ROUNDS):
            for length in _PROMPT_LENGTHS:
                rows += _steps(llm, random_prompts(1, length - 8, vocab_size, seed + length), 2)
            for size, length in _BATCHES:
                rows += _steps(llm, random_prompts(size, length, vocab_size, 1000 * seed + size), _OUTPUT_LEN)
    return fit(typical(rows))


def typical(rows: Sequence[Row]) -> list[Row]:
    """The median of steps with equal features: other processes delay some."""
    seconds: dict[Features, list[float]] = {}
    for features, took_s in rows:
        seconds.setdefault(features, []).append(took_s)
    return [(features, statistics.median(each)) for features, each in seconds.items()]


def _steps(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[Row]:
    from tensorweave import SamplingParams

    llm.get_stats()
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
    return [row for step in llm.get_stats() if (row := _row(step)) is not None]


def _row(step: dict[str, Any]) -> Row | None:
    """Of a step with prompts and decodes together it is not known which KV is whose: left out."""
    batch, kv = step["inflightBatchingStats"], step["kvCacheStats"]
    prompt, num_prompts, decodes = batch["numCtxTokens"], batch["numContextRequests"], batch["numGenRequests"]
    if (prompt and decodes) or not (prompt or decodes):
        return None
    context = prompt * prompt / num_prompts / 2 if num_prompts else 0.0
    kv_tokens = 0.0 if prompt else float(kv["usedNumBlocks"] * kv["tokensPerBlock"])
    return (1.0, prompt, context, decodes, kv_tokens), step["iterLatencyMS"] / 1e3


def fit(rows: Sequence[Row]) -> tuple[CostModel, dict[str, float]]:
    """Least squares of the relative errors, with no coefficient below 0.

    Raises:
        ValueError: There are too few steps.
    """
    if len(rows) < 2 * len(_FIELDS):
        raise ValueError(f"{len(rows)} steps are too few to fit {len(_FIELDS)} numbers")
    features = np.array([row[0] for row in rows])
    seconds = np.array([row[1] for row in rows])
    scaled = features / seconds[:, None]
    used = list(range(len(_FIELDS)))
    while True:
        solution, *_ = np.linalg.lstsq(scaled[:, used], np.ones(len(rows)), rcond=None)
        if not used or solution.min() >= 0:
            break
        used.pop(int(solution.argmin()))
    numbers = dict.fromkeys(_FIELDS, 0.0) | {_FIELDS[place]: float(x) for place, x in zip(used, solution, strict=True)}
    cost = CostModel(**numbers)
    errors = sorted(abs(cost.seconds(row) / took_s - 1) for row, took_s in rows)
    return cost, {
        "num_steps": len(rows),
        "median_error": statistics.median(errors),
        "mean_error": statistics.fmean(errors),
    }


def write_cost_model(path: Path, cost: CostModel, about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_into(path.parent):
        path.write_text(json.dumps({"cost": dataclasses.asdict(cost), **about}, indent=2) + "\n", encoding="utf-8")


def read_cost_model(path: Path) -> CostModel:
    """Raises ValueError if the file has none."""
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))["cost"]
        cost = CostModel(**{name: float(numbers[name]) for name in _FIELDS})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no cost model ({type(error).__name__}: {error})") from None
    if min(dataclasses.astuple(cost)) < 0 or cost.fixed_s + cost.per_decode_s <= 0:
        raise ValueError(f"{path}: a step would take no time, or less")
    return cost
