"""vLLM on the rows of a suite of `tensorweave bench suite`: the same token lists, clock and report.

    PYTHONPATH=VLLM:. python benchmarks/rival_vllm.py h100-8b --json rival.json
    python benchmarks/compare.py ours.json rival.json

vLLM runs as shipped, except for the length of its sequences, the share of memory and what the arguments say. Needs
vLLM, and of this project only what its standard library, psutil and safetensors need.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.arguments import positive
from tensorweave.cli.suite_run import Generate, add_suite_arguments, new_document, run_suite, suite_of

_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
"""Its random weights in 4 bits; the output head stays in 16, where ours has 8."""


def vllm_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`."""
    suite = suite_of(args)
    return {
        "tensor_parallel_size": args.tensor_parallel_size,
        "disable_custom_all_reduce": args.no_custom_all_reduce,
        "load_format": "dummy" if args.model is None else "auto",
        "skip_tokenizer_init": True,
        "dtype": suite.dtype,
        "max_model_len": suite.max_seq_len,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "quantization": "fp8" if args.quantization == "fp8" else None,
        "kv_cache_dtype": args.kv_dtype,
        "disable_log_stats": True,
    }


def add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92, help="(default: %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="GPUs (default: %(default)s)")
    parser.add_argument("--no-custom-all-reduce", action="store_true", help="sums over GPUs by NCCL alone")


@contextmanager
def open_vllm(model_dir: Path, options: dict[str, Any], quantization: str) -> Iterator[Generate]:
    from vllm import LLM, SamplingParams

    if quantization == "w4a16" and options["load_format"] == "dummy":  # vLLM 0.26 takes it from the file alone
        file = model_dir / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "quantization_config": _GPTQ}), "utf-8")
    llm = LLM(str(model_dir), **options)
    found = llm.llm_engine.model_config.quantization
    if (quantization == "none") != (found is None):
        raise SystemExit(f"vLLM computes with quantization {found}, not {quantization}")

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(output.outputs[0].token_ids) for output in llm.generate(inputs, sampling, use_tqdm=False)]

    yield generate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    add_vllm_arguments(parser)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from importlib.metadata import version

    options = vllm_options(args)
    variables = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    document = {**new_document(args, "vLLM", version("vllm")), "engine": options, "environment": variables}
    run_suite(args, document, lambda model_dir: open_vllm(model_dir, options, args.quantization))
    return 0


if __name__ == "__main__":
    sys.exit(main())
