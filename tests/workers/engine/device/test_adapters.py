"""Mixed batches of adapters on the device engine: the tokens of transformers with each adapter merged by peft; places
that are given to others. On a CPU with the reference kernels, on a GPU with the fast ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import can_run_hopper_kernels
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.device.graphs import AdaptedRows
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tests.workers.engine.device.test_engine import device_engine
from tests.workers.engine.device.test_same_bits import WIDE
from tests.workers.engine_drive import ScatteredBlocks, generate, logits_of, make_request, random_prompts
from tests.workers.lora.adapter_gang import adapter_at
from tests.workers.lora.peft_adapters import VARIANTS, save_adapter, their_answers
from tests.workers.tiny_models import make_model

NUM_TOKENS = 6
PROMPTS = random_prompts(2, 60, seed=5)


def setup_adapters(name: str, path: Path, count: int) -> tuple[Any, list[Path]]:
    model = make_model(name, path / "model")
    paths = [path / str(number) for number in range(count)]
    for number, (at, fields) in enumerate(zip(paths, VARIANTS, strict=False)):
        save_adapter(model, at, number, **fields)
    return model, paths


def with_adapters(path: Path, max_loras: int, **knobs: Any) -> DeviceEngine:
    lora = {"enable_lora": True, "lora_config": {"max_lora_rank": 64, "max_loras": max_loras, "max_cpu_loras": 32}}
    return device_engine(path / "model", **lora, **knobs)


def read(engine: DeviceEngine, paths: list[Path]) -> list[RankAdapter]:
    assert engine.adapter_reader is not None
    return [engine.adapter_reader.read(adapter_at(path, path.name)) for path in paths]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_mixed_batch(name: str, tmp_path: Path) -> None:
    model, paths = setup_adapters(name, tmp_path, len(VARIANTS))
    engine = with_adapters(tmp_path, len(VARIANTS))
    adapters: list[RankAdapter | None] = [*read(engine, paths), None]
    expected = [their_answers(model, at, PROMPTS, NUM_TOKENS) for at in [*paths, None]]
    for number, prompt in enumerate(PROMPTS):
        answers = generate(engine, [prompt] * len(adapters), NUM_TOKENS, chunk=24, most_running=8, adapters=adapters)
        assert answers == [each[number] for each in expected]


def test_fused_tensors(tmp_path: Path) -> None:
    """One A for queries, keys and values, and one for gates and ups, whose outputs alternate on the device."""
    model = make_model("phi3_window", tmp_path / "model")
    save_adapter(model, tmp_path / "0", 0, target_modules="all-linear", r=8)
    engine = with_adapters(tmp_path, 1)
    adapters: list[RankAdapter | None] = [*read(engine, [tmp_path / "0"]), None]
    expected = [their_answers(model, at, PROMPTS[:1], NUM_TOKENS)[0] for at in (tmp_path / "0", None)]
    assert expected[0] != expected[1]
    assert generate(engine, PROMPTS[:1] * 2, NUM_TOKENS, chunk=24, adapters=adapters) == expected


def test_places_go_to_others(tmp_path: Path) -> None:
    model, paths = setup_adapters("llama", tmp_path, 5)
    engine = with_adapters(tmp_path, 2)
    adapters = read(engine, paths)
    expected = [their_answers(model, at, PROMPTS[:1], NUM_TOKENS)[0] for at in paths]
    for first, second in [(0, 1), (2, 1), (3, 4), (0, 2), (0, 4)]:
        pair = [adapters[first], adapters[second]]
        assert generate(engine, PROMPTS[:1] * 2, NUM_TOKENS, adapters=pair) == [expected[first], expected[second]]


def test_a_step_without_adapters_is_one_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes of which some have adapters and decodes of which none has run in different forms, to the same tokens."""
    model, paths = setup_adapters("llama", tmp_path, 1)
    engine, ran = with_adapters(tmp_path, 1), list[object]()
    run = engine.graphs.run
    monkeypatch.setattr(engine.graphs, "run", lambda size: (ran.append(size), run(size)))
    adapters = [*read(engine, paths), None]
    expected = [their_answers(model, at, PROMPTS[:1], NUM_TOKENS)[0] for at in (paths[0], None)]
    assert generate(engine, PROMPTS[:1] * 2, NUM_TOKENS, adapters=adapters) == expected
    assert AdaptedRows(2) in ran
    assert 2 not in ran
    ran.clear()
    assert generate(engine, PROMPTS[:1] * 2, NUM_TOKENS) == [expected[1]] * 2
    assert 2 in ran
    assert AdaptedRows(2) not in ran


def decode_logits(engine: DeviceEngine, adapters: Sequence[RankAdapter | None]) -> Tensor:
    """[steps, rows, V]: each row a sequence of its own with its adapter; tokens are given."""
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block)
    prompts, told = random_prompts(len(adapters), 30, seed=9), list[Tensor]()
    requests = [make_request(number, prompt) for number, prompt in enumerate(prompts)]
    for request, adapter in zip(requests, adapters, strict=True):
        request.adapter = adapter
        logits_of(engine, ScheduledBatch((StepRow.of_context(request, 0, len(request.tokens)),)), resources)
    for step in range(3):
        for number, request in enumerate(requests):
            request.tokens.append(3 + (7 * number + step) % 200)
        rows = tuple(StepRow(request, len(request.tokens) - 1, 1, 1) for request in requests)
        told.append(logits_of(engine, ScheduledBatch((), rows), resources).float().cpu().clone())
    for request in requests:
        for manager in engine.resource_managers:
            manager.free_resources(request)
    return torch.stack(told)


def rows_with(adapters: Sequence[RankAdapter], num_rows: int) -> list[RankAdapter | None]:
    """The last of several rows, and every fifth, without an adapter."""
    return [None if i % 5 == 4 or 0 < i == num_rows - 1 else adapters[i % len(adapters)] for i in range(num_rows)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not can_run_hopper_kernels(torch.device("cuda", 0)), reason="no Hopper GPU"
)
@pytest.mark.parametrize("graphs", [True, False])
def test_logits_of_few_rows(graphs: bool, tmp_path: Path) -> None:
    """Adapters in the products of few rows, beside the reference kernels in float32; rows without one have the bits of
    a step without adapters."""
    model = make_model("llama", tmp_path / "model", **WIDE)
    paths = [tmp_path / str(number) for number in range(4)]
    for number, (path, fields) in enumerate(zip(paths, VARIANTS, strict=False)):
        save_adapter(model, path, number, **fields)
    knobs = {} if graphs else {"cuda_graph_config": None}
    reference = with_adapters(tmp_path, 4, max_batch_size=100)
    ours = with_adapters(tmp_path, 4, device="cuda", dtype="bfloat16", max_batch_size=100, **knobs)
    for num_rows in (1, 3, 16, 17, 64, 100):
        expected = decode_logits(reference, rows_with(read(reference, paths), num_rows))
        without = decode_logits(ours, [None] * num_rows)
        found = decode_logits(ours, adapters := rows_with(read(ours, paths), num_rows))
        has = torch.tensor([adapter is not None for adapter in adapters])
        error = (found - expected).norm() / expected.norm()
        effect = (without - expected)[:, has].norm() / expected[:, has].norm()
        assert error < 0.3, f"{num_rows} rows: {error:.3f}; the reference kernels in bfloat16 have 0.17"
        assert effect > 1.0, "the adapters do little"
        assert torch.equal(found[:, ~has], without[:, ~has]), f"{num_rows} rows: those without adapters"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu(graphs: bool, tmp_path: Path) -> None:
    model, paths = setup_adapters("qwen3", tmp_path, 6)
    knobs = {} if graphs else {"cuda_graph_config": None}
    engine = with_adapters(tmp_path, 6, device="cuda", **knobs)
    adapters: list[RankAdapter | None] = [*read(engine, paths), None]
    expected = [their_answers(model, at, PROMPTS[:1], NUM_TOKENS)[0] for at in [*paths, None]]
    assert generate(engine, PROMPTS[:1] * 7, NUM_TOKENS, chunk=24, adapters=adapters) == expected
