"""The device engine against transformers: equal greedy ids; tokens that stay on the device; slots and block tables.

On a CPU it runs on the reference kernels, on a GPU on the fast ones and in CUDA graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.step.pending import NothingPending
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tests.workers.engine_drive import ScatteredBlocks, engine_args, generate, logits_of, make_request, random_prompts
from tests.workers.tiny_models import DENSE, MIXTURES, VOCAB, make_model, their_greedy

PROMPTS = [*random_prompts(5, 90), [7], [5] * 32, list(range(100, 133))]
MISSING = {
    "gemma2": "soft caps of logits",
    "gemma3": "norms whose weights have an offset",
    "gpt_oss": "experts whose gates are not silu",
    "olmo2": "norms behind attention and MLP alone",
    "olmo3": "norms behind attention and MLP alone",
}
LARGER = {"qwen2_moe": {"hidden_size": 96}}
"""On a GPU heads have 16 elements and more."""
EVEN = [name for name in (*DENSE, *MIXTURES) if name != "llama_biases" and name not in MISSING]


def device_engine(path: Path, **knobs: Any) -> DeviceEngine:
    engine = load_engine(engine_args(path, **knobs), SoloComm(), is_on_device=True)
    assert isinstance(engine, DeviceEngine)
    return engine


@pytest.mark.parametrize("name", EVEN)
def test_greedy_ids_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    assert generate(device_engine(tmp_path), PROMPTS, 12, chunk=24) == their_greedy(model, PROMPTS, 12)


@pytest.mark.parametrize("name", MISSING)
def test_what_has_no_kernels_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path)
    with pytest.raises(ValueError, match=f"a device engine has no kernels for {MISSING[name]}"):
        device_engine(tmp_path)


def test_a_token_that_only_the_device_knows_is_read_there(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    prompt = PROMPTS[0]
    engine = device_engine(tmp_path)
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    expected = generate(device_engine(tmp_path), [prompt], 3)[0]
    request = make_request(0, prompt)
    tokens = []
    rows = [StepRow.of_context(request, 0, len(prompt)), *(StepRow(request, len(prompt) + i, 1, 1) for i in range(2))]
    for row in rows:
        is_context = row.start == 0
        batch = ScheduledBatch((row,)) if is_context else ScheduledBatch((), (row,))
        step = engine.launch(batch, resources, NothingPending()).result()
        assert step.rows is not None
        assert step.rows.positions_R[:1].tolist() == [row.stop]
        newest = step.sampled_RV[:1].argmax(-1)
        step.rows.tokens_S[step.rows.slots_R[:1].long()] = newest.int()
        tokens.append(newest.item())
    assert request.tokens == prompt, "the host was never told of a token"
    assert tokens == expected


def test_block_tables_follow_growth_and_exchanges(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = device_engine(tmp_path)
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    prompt = random_prompts(1, 60, seed=3)[0] + [3] * 20
    request = make_request(0, prompt)
    logits_of(engine, ScheduledBatch((StepRow.of_context(request, 0, len(prompt)),)), resources)
    table = list(resources.block_ids(request))
    other = resources.take_block()
    engine.pool.cache[:, other] = engine.pool.cache[:, table[1]]
    engine.pool.cache[:, table[1]] = float("nan")
    resources.exchange(request, 1, other)
    request.tokens.append(9)
    after = logits_of(engine, ScheduledBatch((), (StepRow(request, len(prompt), 1, 1),)), resources)
    assert torch.isfinite(after[0]).all(), "the block that was given back is not read"


def test_slots_of_ended_requests_go_to_others(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = device_engine(tmp_path, max_batch_size=2)
    expected = generate(device_engine(tmp_path), PROMPTS, 5)
    assert generate(engine, PROMPTS, 5, most_running=2) == expected


def test_logits_may_be_edited_and_a_middle_chunk_has_none(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = device_engine(tmp_path)
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    first, second = make_request(0, PROMPTS[0]), make_request(1, [3, 4, 5])
    batch = ScheduledBatch((StepRow.of_context(first, 0, len(PROMPTS[0]) - 1), StepRow.of_context(second, 0, 3)))
    logits = logits_of(engine, batch, resources)
    assert logits.shape == (1, VOCAB)
    logits[:, 2] = float("-inf")
    assert logits_of(engine, ScheduledBatch((StepRow.of_context(first, 0, 5),)), resources).shape == (0, VOCAB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama_llama3", "qwen3_yarn", "qwen3_moe", "qwen2_moe", "granite", "glm4"])
def test_greedy_ids_on_a_gpu(name: str, graphs: bool, tmp_path: Path) -> None:
    model = make_model(name, tmp_path, **LARGER.get(name, {}))
    knobs: dict[str, Any] = {"device": "cuda"} | ({} if graphs else {"cuda_graph_config": None})
    assert generate(device_engine(tmp_path, **knobs), PROMPTS, 12, chunk=24) == their_greedy(model, PROMPTS, 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama_llama3", "qwen3_moe"])
def test_no_step_waits_for_the_gpu(name: str, graphs: bool, tmp_path: Path) -> None:
    """Prompt chunks, decodes and both together; torch raises where it would wait."""
    make_model(name, tmp_path)
    engine = device_engine(tmp_path, device="cuda", **({} if graphs else {"cuda_graph_config": None}))
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    first, second = make_request(0, PROMPTS[0]), make_request(1, PROMPTS[1])
    batches = [
        ScheduledBatch((StepRow.of_context(first, 0, len(PROMPTS[0])),)),
        ScheduledBatch((StepRow.of_context(second, 0, len(PROMPTS[1])),), (StepRow(first, len(PROMPTS[0]), 1, 1),)),
        ScheduledBatch((), (StepRow(first, len(PROMPTS[0]) + 1, 1, 1), StepRow(second, len(PROMPTS[1]), 1, 1))),
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            engine.launch(batch, resources, NothingPending())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
