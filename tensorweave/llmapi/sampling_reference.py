"""Writes docs/sampling.md from the definitions: `python -m tensorweave.llmapi.sampling_reference docs/sampling.md`.

A test compares the page in docs/ with what this writes, so it is never out of date.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tensorweave.cluster.sampling_spec import KNOBS, MAX_INT, Knob

_INTRODUCTION: Final = """# Sampling

Made by `python -m tensorweave.llmapi.sampling_reference docs/sampling.md` from `cluster/sampling_spec.py`. Edit that.

These numbers have the same name and meaning in the body of an HTTP request and in `SamplingParams`. A request that
leaves one out, or gives it as null or None, gets the value of the model's `generation_config.json`; where that has none
either, the field has no effect. A number that is out of its range is refused by name. OpenAI's API does not have the
fields marked *extension*.

The logits are edited in this order: logits processors, biases and banned words, penalties, temperature, min_p, top_k,
top_p. A request is greedy with temperature 0, top_p 0, top_k 1 or min_p 1; then the fields marked *random* have no
effect. Without a temperature, requests over HTTP have 1, and those of the `LLM` class are greedy unless they give top_p
or top_k. The same seed, prompt and fields give the same tokens in any batch, on any gang, and after a recovery, as far
as the logits round alike: on CPUs they do, on GPUs it depends on how much a step has to do
([models.md](models.md#equal-results-in-any-batch)). Tokens whose logits differ by less than 2⁻¹⁷ times the temperature
may count as equally likely, and top_k and top_p keep or drop such tokens together.

| field | range | | meaning |
|---|---|---|---|
"""
_OTHERS: Final = """
Other fields have different names or forms in the two APIs: [http_api.md](http_api.md) and [llm_api.md](llm_api.md)
describe them. Only HTTP requests have `logit_bias`; words that must not be generated are `bad_words` there, `bad` and
`bad_token_ids` in `SamplingParams`; only `SamplingParams` has `embedding_bias` and logits processors.
"""


def render() -> str:
    """The whole page."""
    return _INTRODUCTION + "".join(f"{row}\n" for row in _rows()) + _OTHERS


def _rows() -> Iterator[str]:
    for name, knob in KNOBS.items():
        marks = [mark for mark, holds in (("*extension*", knob.is_extension), ("*random*", knob.is_random)) if holds]
        yield f"| `{name}` | {_range(knob)} | {', '.join(marks)} | {knob.doc} |"


def _range(knob: Knob) -> str:
    kind = "integer" if knob.is_integer else "number"
    low = f"above {knob.low}" if knob.is_low_open else f"from {knob.asked_low}"
    high = "" if knob.high in (math.inf, MAX_INT) else f" to {knob.high}"
    http = "" if knob.http_high is None else f" (over HTTP to {knob.http_high})"
    return f"{kind} {low}{high}{http}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
