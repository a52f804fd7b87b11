"""`tensorweave bench suite`: a suite through the `LLM` class, with the share of the roofline that each row reaches."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tensorweave
from tensorweave.cli.figures import write_figures
from tensorweave.cli.suite_plot import bars_svg
from tensorweave.cli.suite_roofline import Rates, Roofline
from tensorweave.cli.suite_rows import Suite
from tensorweave.cli.suite_run import Generate, new_document, run_suite, suite_of
from tensorweave.deploy.config_file import read_document

_QUANTIZATION: Final = {
    "none": (),
    "fp8": ("quant_config.quant_algo=FP8_PER_CHANNEL_PER_TOKEN",),
    "w4a16": ("quant_config.quant_algo=W4A16", "quant_config.group_size=128"),
}
_HEAD_TYPES: Final = {"w4a16": "int8"}
"""Of the output head's weights, where they are not those of the suite."""
_KV_DTYPE: Final = {"auto": (), "fp8": ("kv_cache_config.dtype=fp8",)}


def run(args: argparse.Namespace) -> int:
    from tensorweave.cli.suite_rates import default_device, measure_rates  # imports torch

    suite = suite_of(args)
    suite.choose(args.rows)
    options = engine_options(suite, args)
    layer_dtype = suite.dtype if args.quantization == "none" else args.quantization
    is_multiplied_in_8_bits = args.quantization == "fp8"
    rates = measure_rates(default_device(), suite.dtype, layer_dtype if is_multiplied_in_8_bits else suite.dtype)
    document = new_document(args, "tensorweave", tensorweave.__version__)
    document |= {"rates": dataclasses.asdict(rates), "engine": options}
    print(told(rates, document["card"]["name"]), flush=True)
    head_dtype = _HEAD_TYPES.get(args.quantization, suite.dtype)
    roofline = Roofline(suite.shape, rates, head_dtype, layer_dtype, document["kv_dtype"])

    open_engine = functools.partial(open_llm, options=options, is_random=args.model is None)
    run_suite(args, document, open_engine, roofline.row_s)
    if args.plot is not None:
        write_figures(args.plot, bars_svg([document]))
    return 0


@contextmanager
def open_llm(model_dir: Path, options: dict[str, Any], *, is_random: bool) -> Iterator[Generate]:
    """Open an `LLM` with these arguments, as a user would."""
    from tensorweave import LLM, SamplingParams

    load_format = "dummy" if is_random else "auto"
    with LLM(model=model_dir, load_format=load_format, skip_tokenizer_init=True, **options) as llm:

        def generate(prompts: list[list[int]], output_len: int) -> list[int]:
            sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
            return [output.outputs[0].length for output in llm.generate(prompts, sampling, use_tqdm=False)]

        yield generate


def engine_options(suite: Suite, args: argparse.Namespace) -> dict[str, Any]:
    """`LLM` arguments: the suite's, those of the quantization, then `--set`."""
    given = [f"{key}={json.dumps(value)}" for key, value in {"dtype": suite.dtype, **suite.engine}.items()]
    changes = [*given, *_QUANTIZATION[args.quantization], *_KV_DTYPE[args.kv_dtype], *args.changes]
    return read_document(os.devnull, changes).checked().data


def told(rates: Rates, name: str) -> str:
    return (
        f"{name}: {rates.read_bytes / 1e12:.3f} TB/s read, {rates.operations / 1e12:.4g} TFLOP/s in products, "
        f"{rates.layer_operations / 1e12:.4g} in the layers'"
    )
