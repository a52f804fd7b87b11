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
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tensorweave.cli.arguments import positive
from tensorweave.cli.suite_run import Generate, add_suite_arguments, new_document, run_suite, suite_of

_PRODUCTS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GPTQ: Final = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
    "modules_in_block_to_quantize": _PRODUCTS,
}  # fmt: skip
"""Its random weights in 4 bits; the output head stays in 16, where ours has 8. Without the names vLLM 0.26 looks into
the files of weights for those that are quantized, and where there are no files computes all in 16 bits."""

_METHODS: Final = {"none": r"16 bits", "fp8": r"\w*Fp8\w*", "w4a16": r"\w*(GPTQ|AWQ|WNA16)\w*"}
"""What vLLM calls the ways to compute a product; that of 16 bits has no name."""

_INSPECTION_TIMEOUT_S: Final = 60


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


def methods_of(inspection: str) -> list[str]:
    """How each kind of product of a model is computed, by vLLM's description of its layers."""
    found = re.findall(r"(?:ParallelLinear|RoutedExperts)\((?:quant=(\w+))?", inspection)
    return sorted({method or "16 bits" for method in found})


def check_methods(methods: list[str], quantization: str) -> None:
    """Raises SystemExit unless all products are computed with weights of this kind."""
    if not methods or not all(re.fullmatch(_METHODS[quantization], method) for method in methods):
        raise SystemExit(f"vLLM does not compute all products with weights of {quantization}")


@contextmanager
def open_vllm(
    model_dir: Path, options: dict[str, Any], quantization: str, document: dict[str, Any]
) -> Iterator[Generate]:
    from vllm import LLM, SamplingParams

    if quantization == "w4a16" and options["load_format"] == "dummy":  # vLLM 0.26 takes it from the file alone
        file = model_dir / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "quantization_config": _GPTQ}), "utf-8")
    llm = LLM(str(model_dir), **options)
    workers = llm.collective_rpc("get_model_inspection", timeout=_INSPECTION_TIMEOUT_S)
    methods = sorted({method for worker in workers for method in methods_of(worker)})
    print(f"vLLM computes products by: {', '.join(methods) or 'unknown'}", flush=True)
    document["methods"] = methods
    check_methods(methods, quantization)

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
    run_suite(args, document, lambda model_dir: open_vllm(model_dir, options, args.quantization, document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
