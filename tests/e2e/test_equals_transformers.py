"""Greedy ids of small random models equal transformers' own in float32: 200 random prompts of 1 to 3,000 tokens, one
rank and two. In bfloat16, log-probabilities are as near to those of float32 as transformers' own.

The random weights leave near-ties now and then, so a first difference is accepted only where transformers itself holds
the two tokens equal within float32 rounding; how many such there were is bounded.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tensorweave import LLM, KvCacheConfig, SamplingParams
from tests.e2e.bfloat16_logprobs import measure
from tests.workers.tiny_models import VOCAB, make_model

NUM_PROMPTS = 200
NUM_TOKENS = 12
TIE = 1e-4
MEAN_ERROR, LARGEST_ERROR = 0.01, 0.06
"""Of log-probabilities in bfloat16, natural logarithms."""


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    lengths = [1, 2, 31, 32, 33, 3000] + [int(3000 ** rng.random()) for _ in range(NUM_PROMPTS - 6)]
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def transformers_ids(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy ids, and the logits that each was the largest of."""
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), [row[0] for row in out.logits]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen2", "qwen3"])
def test_greedy_ids(family: str, size: int, tmp_path: Path) -> None:
    reference = make_model(family, tmp_path)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    cache = KvCacheConfig(max_tokens=40_000)
    with LLM(
        tmp_path,
        skip_tokenizer_init=True,
        dtype="float32",
        tensor_parallel_size=size,
        kv_cache_config=cache,
        max_num_tokens=700,
        max_batch_size=24,
    ) as llm:
        outputs = llm.generate(prompts(), params, use_tqdm=False)
    num_ties = 0
    for prompt, output in zip(prompts(), outputs, strict=True):  # type: ignore[arg-type]
        ids, logits = transformers_ids(reference, prompt)
        got = output.outputs[0].token_ids
        if got == ids:
            continue
        at = next(i for i, (ours, theirs) in enumerate(zip(got, ids, strict=True)) if ours != theirs)
        gap = (logits[at][ids[at]] - logits[at][got[at]]).item()
        assert gap < TIE, f"prompt of {len(prompt)}: token {at} is {got[at]}, not {ids[at]}, {gap} below"
        num_ties += 1
    assert num_ties <= 2


ROUNDED = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "head_dim": 64,
    "initializer_range": 0.06,
}


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_log_probabilities(family: str, device: str, tmp_path: Path) -> None:
    """Of 24 prompts together. Rounding of the weights is no error: both have the same."""
    reference = make_model(family, tmp_path, **ROUNDED).bfloat16()
    reference.save_pretrained(tmp_path)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in (1, 2, 31, 33, 300, *range(5, 24))]
    cache = KvCacheConfig(max_tokens=40_000)
    with LLM(tmp_path, skip_tokenizer_init=True, dtype="bfloat16", device=device, kv_cache_config=cache) as llm:
        ours, theirs = measure(llm, reference.float(), prompts)
    print(f"{family} on {device}: ours {ours}, transformers in bfloat16 {theirs}")
    assert ours.mean < MEAN_ERROR
    assert ours.largest < LARGEST_ERROR
    assert ours.mean < 1.5 * theirs.mean
