"""`speculative_config` of the LLM class: the same outputs, statistics that tell of drafts, and mistakes by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave import LLM, NGramDecodingConfig, SamplingParams, UserProvidedDecodingConfig
from tensorweave.workers import build
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import BaseResourceManager
from tests.llmapi.small_llm import CACHE, one, write_small_model
from tests.llmapi.test_gang_llm import counting_up, pids_of

PROMPTS = ["ab cd ab cd ab", "the cat and the dog and the cat", "x"]
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=40, temperature=0.8, seed=3, n=3, repetition_penalty=1.1),
    SamplingParams(max_tokens=40, temperature=1.0, seed=4, stop=["e", "a"], min_tokens=5),
]


class RepeatingDrafter:
    """Drafts that the newest token comes again and again."""

    def __init__(self, config: UserProvidedDecodingConfig | None = None) -> None:
        self.num_asked = 0

    def prepare_draft_tokens(self, scheduled_requests: Any) -> None:
        self.num_asked += 1
        for request in scheduled_requests.generation_requests:
            request.py_draft_tokens = [request.tokens[-1]] * request.max_draft_len


class Listener(BaseResourceManager):
    def __init__(self) -> None:
        self.num_freed = 0

    def free_resources(self, request: LlmRequest) -> None:
        self.num_freed += 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads that the native kernels take, whose bits do not depend on the batch."""
    path = tmp_path_factory.mktemp("llama")
    return write_small_model(path, head_dim=32)


def outputs_of(llm: LLM) -> list[Any]:
    outputs: Any = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [
        (each.token_ids, each.text, each.logprobs, each.finish_reason, each.stop_reason)
        for output in outputs
        for each in output.outputs
    ]


def open_llm(directory: Path, **knobs: Any) -> LLM:
    return LLM(directory, dtype="float32", kv_cache_config=CACHE, **knobs)


@pytest.fixture(scope="module")
def plain(directory: Path) -> list[Any]:
    with open_llm(directory) as llm:
        outputs = outputs_of(llm)
        assert all(row["specDecodingStats"] is None for row in llm.get_stats())
        return outputs


@pytest.mark.parametrize(
    "config",
    [
        NGramDecodingConfig(max_draft_len=5),
        NGramDecodingConfig(max_draft_len=5, max_matching_ngram_size=3, is_use_oldest=False, is_public_pool=True),
        {"decoding_type": "NGram", "max_draft_len": 1, "is_keep_all": False, "max_concurrency": 8},
        UserProvidedDecodingConfig(max_draft_len=3, drafter=RepeatingDrafter()),
        {"decoding_type": "User_Provided", "max_draft_len": 3, "drafter": f"{__name__}:RepeatingDrafter"},
    ],
    ids=["n-gram", "public", "as a dict", "user", "class"],
)
def test_outputs_are_the_same(config: Any, directory: Path, plain: list[Any]) -> None:
    with open_llm(directory, speculative_config=config) as llm:
        assert outputs_of(llm) == plain
        rows = [row["specDecodingStats"] for row in llm.get_stats() if row["specDecodingStats"]]
    assert rows
    for row in rows:
        assert row["numDraftTokens"] >= row["numRequestsWithDraftTokens"] > 0
        assert row["acceptanceLength"] == 1 + row["numAcceptedTokens"] / row["numRequestsWithDraftTokens"]
        assert row["iterLatencyMS"] > 0
        assert 0 < row["draftOverhead"] < 1


def test_a_users_resource_manager_is_told_of_ends(directory: Path) -> None:
    listener, drafter = Listener(), RepeatingDrafter()
    config = UserProvidedDecodingConfig(max_draft_len=3, drafter=drafter, resource_manager=listener)
    with open_llm(directory, speculative_config=config) as llm:
        outputs_of(llm)
    assert listener.num_freed >= 5
    assert drafter.num_asked


def test_mistakes_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NGramDecodingConfig(max_draft_len=4)
    with pytest.raises(ValueError, match="leave disable_overlap_scheduler out"):
        open_llm(directory, speculative_config=config, disable_overlap_scheduler=False)
    with pytest.raises(ValueError, match="decoding_type 'Eagle' is not supported yet"):
        open_llm(directory, speculative_config={"decoding_type": "Eagle", "max_draft_len": 4})
    with pytest.raises(ValueError, match="set both or none"):
        NGramDecodingConfig(max_draft_len=4, acceptance_window=3)
    with pytest.raises(ValueError, match="sequences, not trees"):
        NGramDecodingConfig(max_draft_len=4, max_total_draft_tokens=8)
    with pytest.raises(ValueError, match="without prepare_draft_tokens"):
        UserProvidedDecodingConfig(max_draft_len=4, drafter=print)
    with pytest.raises(ValueError, match=r"drafter 'nowhere:Drafter' cannot be loaded"):
        open_llm(directory, speculative_config=UserProvidedDecodingConfig(max_draft_len=4, drafter="nowhere:Drafter"))
    monkeypatch.setattr(build, "pick_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match="speculative_config is for CPUs so far"):
        open_llm(directory, speculative_config=config)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_gang_that_loses_a_rank_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    """The drafter, made here, goes to the ranks by value; the tokens are forced, and drafted right."""

    class CountingDrafter:
        def prepare_draft_tokens(self, scheduled_requests: Any) -> None:
            for request in scheduled_requests.generation_requests:
                first = 20 + len(request.tokens)
                request.py_draft_tokens = range(first, first + request.max_draft_len)

    directory = write_small_model(tmp_path)
    config = UserProvidedDecodingConfig(max_draft_len=3, drafter=CountingDrafter())
    with open_llm(directory, tensor_parallel_size=2, num_threads=1, speculative_config=config) as llm:
        hurry = tmp_path / "hurry"
        slow = SamplingParams(max_tokens=200, ignore_eos=True, logits_processor=counting_up(hurry))
        running = llm.generate_async([9, 8, 7], slow, streaming=True)
        iterator = iter(running)  # kept: dropping it early would cancel the request
        next(iterator)
        os.kill(pids_of(llm)[1], signal.SIGKILL)
        hurry.touch()
        assert running.result(600).outputs[0].token_ids == list(range(23, 223))
        assert sum(llm._runtime.dispatcher.counts.retries.values()) >= 1
        assert one(llm.generate([9, 8, 7], slow)).outputs[0].token_ids == list(range(23, 223))
        rows = [row["specDecodingStats"] for row in llm.get_stats(timeout=60.0) if row["specDecodingStats"]]
        assert sum(row["numAcceptedTokens"] for row in rows) > 100
