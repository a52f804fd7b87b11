"""One engine of `duel.py`, in a process of its own, under the Python that has it.

argv: tensorweave, vllm or llama_cpp, the tree that tensorweave is imported from, model directory (llama_cpp: a GGUF),
dtype (of tensorweave perhaps with ':' and a `QuantAlgo`), longest sequence, most sequences and most tokens at once. A
line `batch input output` on standard input is answered with the seconds that it took: the prompts are random, all
requests are submitted at once, and each generates exactly `output` tokens.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]
SMALLEST_VOCABULARY = 32000  # of models that are measured here: ids below it are in all of them


def tensorweave(model: str, dtype: str, max_len: int, max_batch: int, num_cached: int) -> Generate:
    from tensorweave import LLM, SamplingParams

    # Blocks for all at once, as vLLM has, and no prefix that a warm-up left behind.
    cache = {"max_tokens": num_cached, "enable_block_reuse": False}
    dtype, _, algorithm = dtype.partition(":")
    knobs: dict[str, Any] = {"quant_config": {"quant_algo": algorithm}} if algorithm else {}
    llm = LLM(model=model, dtype=dtype, skip_tokenizer_init=True, max_seq_len=max_len, kv_cache_config=cache, **knobs)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[int]:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return [output.outputs[0].length for output in llm.generate(prompts, sampling, use_tqdm=False)]

    return generate


def vllm(model: str, dtype: str, max_len: int, max_batch: int, num_cached: int) -> Generate:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    options: dict[str, Any] = {"max_model_len": max_len, "max_num_seqs": max_batch, "enable_prefix_caching": False}
    llm = LLM(model=model, dtype=dtype, **options)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[int]:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(output.outputs[0].token_ids) for output in llm.generate(requests, sampling, use_tqdm=False)]

    return generate


def llama_cpp(model: str, dtype: str, max_len: int, max_batch: int, num_cached: int) -> Generate:
    """By its C interface: one batch for all prompts, then one per step, the most likely token by its own sampler."""
    import ctypes

    import llama_cpp as lib  # type: ignore[import-not-found, unused-ignore]

    num_threads = len(os.sched_getaffinity(0))
    lib.llama_backend_init()
    weights = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.kv_unified = num_cached, max_batch, True
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = num_threads
    context = lib.llama_init_from_model(weights, settings)
    sampler = lib.llama_sampler_init_greedy()
    batch = lib.llama_batch_init(512, 0, 1)

    def add(token: int, position: int, sequence: int, *, is_last: bool) -> None:
        n = batch.n_tokens
        batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, is_last
        batch.seq_id[n][0] = sequence
        batch.n_tokens = n + 1

    def decode() -> None:
        assert lib.llama_decode(context, batch) == 0
        batch.n_tokens = 0

    def prefill(prompts: list[list[int]]) -> list[int]:
        newest = [0] * len(prompts)
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                add(token, position, sequence, is_last=position + 1 == len(prompt))
                if position + 1 == len(prompt) or batch.n_tokens == 512:
                    last = batch.n_tokens - 1
                    decode()
                    if position + 1 == len(prompt):
                        newest[sequence] = lib.llama_sampler_sample(sampler, context, last)
        return newest

    def generate(prompts: list[list[int]], num_tokens: int) -> list[int]:
        lib.llama_memory_clear(lib.llama_get_memory(context), ctypes.c_bool(False))
        newest = prefill(prompts)
        for step in range(num_tokens - 1):
            for sequence, token in enumerate(newest):
                add(token, len(prompts[sequence]) + step, sequence, is_last=True)
            decode()
            newest = [lib.llama_sampler_sample(sampler, context, i) for i in range(len(prompts))]
        return [num_tokens] * len(prompts)

    return generate


def main() -> None:
    name, tree, model, dtype, *sizes = sys.argv[1:]
    if name == "tensorweave":
        sys.path.insert(0, tree)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints goes to standard error
    generate = {"tensorweave": tensorweave, "vllm": vllm, "llama_cpp": llama_cpp}[name](model, dtype, *map(int, sizes))
    draws = random.Random(1)
    if name == "tensorweave":
        assert sys.modules["tensorweave"].__file__ == f"{tree}/tensorweave/__init__.py"
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch, num_input, num_output = map(int, line.split())
        prompts = [[draws.randrange(10, SMALLEST_VOCABULARY) for _ in range(num_input)] for _ in range(batch)]
        began_s = time.perf_counter()
        lengths = generate(prompts, num_output)
        elapsed_s = time.perf_counter() - began_s
        assert lengths == [num_output] * batch, lengths
        print(elapsed_s, file=answers, flush=True)
    os._exit(0)  # an engine's own shutdown may take long, and has nothing to save


if __name__ == "__main__":
    main()
