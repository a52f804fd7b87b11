"""Mixed batches of adapters on the device engine: the tokens of transformers with each adapter merged by peft; places
that are given to others. On a CPU with the reference kernels, on a GPU with the fast ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.step.adapter import RankAdapter
from tests.workers.engine.device.test_engine import device_engine
from tests.workers.engine_drive import generate, random_prompts
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
