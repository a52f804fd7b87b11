"""What adapters cost: decode rates of SmolLM2 at one batch size with none, with 8 adapters, and with both mixed, in one
process, in turn.

    python benchmarks/lora_cost.py [--rank 16] [--batch 16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensorweave import LLM, KvCacheConfig, LoraConfig, LoRARequest, SamplingParams
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.store.model_store import resolve_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(path: Path, model: str, rank: int, seed: int) -> None:
    """Random and small: the answers stay text of some kind."""
    torch.manual_seed(seed)
    sizes = load_model_config(resolve_model(model)).sizes
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    D, width = sizes.hidden_size, sizes.intermediate_size
    shapes = dict(
        zip(
            TARGETS, [(queries, D), (keys, D), (keys, D), (D, queries), (width, D), (width, D), (D, width)], strict=True
        )
    )
    tensors = {}
    for layer in range(sizes.num_layers):
        for name, (num_outputs, num_inputs) in shapes.items():
            group = "mlp" if name in TARGETS[4:] else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{group}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, num_inputs) * 0.01
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_outputs, rank) * 0.01
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
    (path / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = []
        for number in range(asked.adapters):
            path = Path(folder) / f"adapter-{number}"
            write_adapter(path, asked.model, asked.rank, number)
            adapters.append(LoRARequest(path.name, number + 1, str(path)))
        measure(asked, adapters)


def measure(asked: argparse.Namespace, adapters: Sequence[LoRARequest]) -> None:
    draws = random.Random(0)
    prompts = [[draws.randrange(1000, 30000) for _ in range(asked.prompt)] for _ in range(asked.batch)]
    mixes: dict[str, list[LoRARequest | None]] = {
        "none": [None] * asked.batch,
        "adapters": [adapters[row % len(adapters)] for row in range(asked.batch)],
        "mixed": [adapters[row % len(adapters)] if row % 2 else None for row in range(asked.batch)],
    }
    rates: dict[str, list[float]] = {name: [] for name in mixes}
    cache = KvCacheConfig(max_tokens=2 * asked.batch * (asked.prompt + asked.tokens), enable_block_reuse=False)
    config = LoraConfig(max_lora_rank=asked.rank)
    with LLM(
        asked.model, skip_tokenizer_init=True, kv_cache_config=cache, lora_config=config, num_threads=asked.threads
    ) as llm:
        for turn in range(asked.rounds + 1):
            for name, mix in mixes.items():
                started_s = time.perf_counter()
                sampling = SamplingParams(max_tokens=asked.tokens, ignore_eos=True)
                outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=mix)
                taken_s = time.perf_counter() - started_s
                assert isinstance(outputs, list)
                if turn:  # the first is the warm-up
                    rates[name].append(sum(len(output.outputs[0].token_ids) for output in outputs) / taken_s)
    base = statistics.median(rates["none"])
    for name, each in rates.items():
        rate = statistics.median(each)
        print(f"{name:9} {rate:8.1f} tok/s   {rate / base:5.3f} of none   ({min(each):.1f} to {max(each):.1f})")


if __name__ == "__main__":
    main()
