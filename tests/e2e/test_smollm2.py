"""The real model's greedy ids, exactly, in float32: whatever the ranks, the chunks, the reuse, the company and the
room."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorweave import LLM, KvCacheConfig, NGramDecodingConfig, RequestOutput, SamplingParams, SchedulerConfig
from tensorweave.workers.store.model_store import resolve_model

pytestmark = pytest.mark.model

# transformers and vLLM agree on these, float32 on the bfloat16 checkpoint.
GREEDY = {
    "What is the capital of France?": "504 3575 282 4649 314 7042 30 2",
    "Write one sentence about the sea.": (
        "504 3426 314 253 4749 284 11965 7815 28 30055 351 1029 284 551 1719 281 624 1038 970 28 253 21651 288 260 551 "
        "1719 6122 282 260 6128 30 2"
    ),
    "List three colors, numbered.": "33 30 3950 198 34 30 10062 198 35 30 4910 2",
}
IDS = [[int(token) for token in ids.split()] for ids in GREEDY.values()]
GREEDY_64 = SamplingParams(max_tokens=64)


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("smollm2-135m-instruct")


def chat_prompts(llm: LLM) -> list[str]:
    return [chat_prompt(llm, text) for text in GREEDY]


def chat_prompt(llm: LLM, text: str) -> str:
    message = {"role": "user", "content": text}
    prompt: str = llm.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return prompt


def token_ids(outputs: Any) -> list[list[int]]:
    assert all(isinstance(output, RequestOutput) for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, dtype="float32", kv_cache_config=KvCacheConfig(max_tokens=16384)) as made:
        yield made


def test_alone_and_again_from_the_prefix_tree(llm: LLM) -> None:
    for prompt, ids in zip(chat_prompts(llm), IDS, strict=True):
        cold = llm.generate(prompt, GREEDY_64)
        warm = llm.generate(prompt, GREEDY_64)
        assert token_ids([cold, warm]) == [ids, ids]
        assert isinstance(warm, RequestOutput)
        assert warm.cached_tokens >= 32
    assert "Paris" in llm.generate(chat_prompts(llm)[0]).outputs[0].text  # type: ignore[union-attr]


def test_inside_a_batch_of_32_random_others(llm: LLM) -> None:
    rng = random.Random(1)
    others = [[rng.randrange(3, 49152) for _ in range(rng.randrange(1, 160))] for _ in range(32)]
    params = [
        SamplingParams(max_tokens=rng.randrange(1, 40), temperature=rng.choice([None, 1.0]), ignore_eos=True)
        for _ in others
    ]
    prompts: list[Any] = [*others[:16], *chat_prompts(llm), *others[16:]]
    outputs = llm.generate(prompts, [*params[:16], *[GREEDY_64] * 3, *params[16:]], use_tqdm=False)
    assert isinstance(outputs, list)
    assert token_ids(outputs[16:19]) == IDS
    lengths = [len(ids) for ids in token_ids(outputs[:16] + outputs[19:])]
    assert lengths == [param.max_tokens for param in params]


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
def test_chunked_prefill_and_reuse_change_nothing(model: Path, chunk: int, reuse: bool) -> None:
    cache = KvCacheConfig(max_tokens=4096, enable_block_reuse=reuse)
    with LLM(model, dtype="float32", kv_cache_config=cache, max_num_tokens=chunk) as llm:
        for _ in range(2):
            outputs = llm.generate(chat_prompts(llm), GREEDY_64, use_tqdm=False)
            assert token_ids(outputs) == IDS


def test_a_pool_so_small_that_it_preempts(model: Path) -> None:
    cache = KvCacheConfig(max_tokens=104, tokens_per_block=8, enable_block_reuse=False)
    policy = SchedulerConfig(capacity_scheduler_policy="MAX_UTILIZATION")
    with LLM(model, dtype="float32", kv_cache_config=cache, scheduler_config=policy) as llm:
        france, sea, colors = chat_prompts(llm)
        outputs = llm.generate([sea, sea, colors, sea, france], GREEDY_64, use_tqdm=False)
        assert token_ids(outputs) == [IDS[1], IDS[1], IDS[2], IDS[1], IDS[0]]
        assert sum(row["inflightBatchingStats"]["numPausedRequests"] for row in llm.get_stats()) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_changes_no_token(model: Path, dtype: str) -> None:
    """A text that is copied, where drafts are right, and greedy and sampled answers in one batch, where few are."""
    copying = "Repeat the following text exactly, word for word: The harbour master keeps a ledger of every ship."
    params = [GREEDY_64] * 3 + [SamplingParams(max_tokens=40, temperature=1.0, seed=i, n=2) for i in range(3)]
    told, accepted = [], 0
    for config in (None, NGramDecodingConfig(max_draft_len=6)):
        with LLM(model, dtype=dtype, kv_cache_config=KvCacheConfig(max_tokens=4096), speculative_config=config) as llm:
            outputs = llm.generate([*chat_prompts(llm), *chat_prompts(llm)], params, use_tqdm=False)
            copied = llm.generate([chat_prompt(llm, copying)], GREEDY_64, use_tqdm=False)
            assert isinstance(outputs, list)
            assert isinstance(copied, list)
            told.append([each.token_ids for output in [*outputs, *copied] for each in output.outputs])
            rows = [row["specDecodingStats"] for row in llm.get_stats() if row["specDecodingStats"]]
            accepted = sum(row["numAcceptedTokens"] for row in rows)
    assert told[0] == told[1]
    if dtype == "float32":
        assert told[0][:3] == IDS
    assert accepted > 10


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long("takes half a minute"))])
def test_tensor_parallel(model: Path, size: int) -> None:
    """Nine heads over three KV heads: three ranks divide them, two do not."""
    cache = KvCacheConfig(max_tokens=4096)
    with LLM(model, dtype="float32", tensor_parallel_size=size, kv_cache_config=cache, num_threads=1) as llm:
        for _ in range(2):
            assert token_ids(llm.generate(chat_prompts(llm), GREEDY_64, use_tqdm=False)) == IDS
        chunked = llm.generate([*chat_prompts(llm), [5] * 900], GREEDY_64, use_tqdm=False)
        assert isinstance(chunked, list)
        assert token_ids(chunked[:3]) == IDS
