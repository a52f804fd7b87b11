"""Every family answers 50 random prompts with the greedy ids of transformers' own class in float32: with prefill on one
rank and decode on two of an engine directory, prompts in chunks, and again with the prefixes in both gangs' trees.

`tests/workers/engine/test_engine.py` has engines alone, on one rank and two. Llama's relatives have tests in
`tests/workers/transfer/test_tokens.py` and `tests/e2e`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.transfer.carriers.loop import LoopNetwork
from tests.workers.engine_drive import generate_on_ranks, random_prompts
from tests.workers.tiny_models import DENSE, MIXTURES, make_model, their_greedy
from tests.workers.transfer_drive import loop_carriers, model_gang, run_disaggregated

NUM_TOKENS = 6
PROMPTS = random_prompts(50, 100, seed=2)
NEW = [*(name for name in DENSE if not name.startswith(("llama", "mistral", "qwen"))), *MIXTURES]


@torch.no_grad()
def check(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    """Each token is the likeliest after those before it, so that all are the greedy ones."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("name", NEW)
def test_greedy_ids(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    checkpoint, engine_dir = tmp_path / "checkpoint", tmp_path / "engine"
    model = make_model(name, checkpoint)
    save_engine_dir(checkpoint, engine_dir, tensor_parallel_size=2, dtype="float32")
    samplings, carriers = [SamplingSpec(max_tokens=NUM_TOKENS)] * len(PROMPTS), loop_carriers(LoopNetwork())
    with (
        model_gang(checkpoint, 1, carriers, name="P", max_num_tokens=64) as prefill,
        model_gang(engine_dir, 2, carriers, name="D", max_num_tokens=64) as decode,
    ):
        cold, warm = (run_disaggregated(prefill, decode, PROMPTS, samplings, name=trees) for trees in ("cold", "warm"))
        assert decode.failures() == {}
    for prompt, answer in zip(PROMPTS, cold, strict=True):
        assert len(answer.tokens) == NUM_TOKENS
        check(model, prompt, answer.tokens)
    assert [answer.tokens for answer in warm] == [answer.tokens for answer in cold]
    assert sum(answer.num_cached_tokens for answer in warm) > sum(answer.num_cached_tokens for answer in cold)


def test_beyond_the_length_at_which_longrope_changes(tmp_path: Path) -> None:
    """Asked for, longer sequences have the long factors at all their positions, as those of transformers have."""
    model = make_model("phi4_mini", tmp_path)
    original = model.config.original_max_position_embeddings
    prompts = [prompt for prompt in random_prompts(6, 1500, seed=1) if len(prompt) > original]
    assert prompts
    expected = their_greedy(model, prompts, NUM_TOKENS)
    for size in (1, 2):
        assert generate_on_ranks(tmp_path, size, prompts, NUM_TOKENS, chunk=400, max_seq_len=2048) == expected
