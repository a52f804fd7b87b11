"""`pipeline_parallel_size` of an `LLM`: ranks on Ray, and the answers of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorweave import LLM, SamplingParams
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.mesh import Mesh
from tensorweave.llmapi.guided_decoding import GuidedDecodingParams
from tensorweave.workers.build import build_executor, check_model
from tensorweave.workers.engine import model_share
from tests.llmapi.small_llm import CACHE, write_small_model
from tests.workers.stage_gang import thread_comms

PROMPTS = [[5, 6, 7, 8], [9, 10, 11] * 30, [12, 13], [14] * 40]


@pytest.mark.long("starts two ranks on Ray")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_stages_answer_as_one_rank(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path)
    numbers = GuidedDecodingParams(json={"type": "array", "items": {"type": "integer"}, "minItems": 5})
    params = [
        SamplingParams(max_tokens=20, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=1.0, seed=3, logprobs=2),
        SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=4, prompt_logprobs=1),
        SamplingParams(max_tokens=30, temperature=1.0, seed=5, guided_decoding=numbers),
    ]
    told = []
    for num_stages in (1, 2):
        with LLM(
            directory, pipeline_parallel_size=num_stages, dtype="float32", kv_cache_config=CACHE, num_threads=1
        ) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            assert isinstance(outputs, list)
            told.append([output.outputs[0] for output in outputs])
            if num_stages == 2:
                with pytest.raises(ValueError, match="save is for pipeline_parallel_size 1"):
                    llm.save(tmp_path / "engine")
    one, two = told
    assert [answer.token_ids for answer in two] == [answer.token_ids for answer in one]
    assert [answer.finish_reason for answer in two] == [answer.finish_reason for answer in one]
    assert [len(answer.logprobs or ()) for answer in two] == [len(answer.logprobs or ()) for answer in one]


def test_what_stages_do_not_run_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_small_model(tmp_path)
    with LLM(directory, dtype="float32", kv_cache_config=CACHE) as llm:
        llm.save(tmp_path / "engine")
    staged = {"pipeline_parallel_size": 2, "kv_cache_config": CACHE}
    with pytest.raises(ValueError, match=r"pipeline_parallel_size is 2, and engine directory .* take the checkpoint"):
        check_model(TorchLlmArgs(model=tmp_path / "engine", **staged))
    monkeypatch.setattr(model_share, "pick_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match="pipeline stages are for CPUs so far"):
        build_executor(TorchLlmArgs(model=directory, **staged), thread_comms(Mesh(pipeline=2))[0])
