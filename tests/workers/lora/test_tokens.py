"""Mixed batches of adapters: the tokens of transformers with each adapter merged by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.speculation_config import NGramDecodingConfig
from tests.workers.engine_drive import random_prompts
from tests.workers.lora.adapter_gang import AdapterGang, adapter_at, answer_apart
from tests.workers.lora.peft_adapters import VARIANTS, save_adapter, their_answers
from tests.workers.tiny_models import make_model

NUM_TOKENS = 8


class Setup:
    """A model, 16 adapters, and what transformers answers to two prompts with each, and with none (the last)."""

    def __init__(self, name: str, path: Path) -> None:
        self.model_path = path / "model"
        model = make_model(name, self.model_path)
        paths = [path / str(number) for number in range(len(VARIANTS))]
        for number, (at, fields) in enumerate(zip(paths, VARIANTS, strict=True)):
            save_adapter(model, at, number, **fields)
        self.adapters: list[Adapter | None] = [adapter_at(at, at.name) for at in paths]
        self.prompts = random_prompts(2, 60, seed=len(name))
        self.expected = [their_answers(model, at, self.prompts, NUM_TOKENS) for at in [*paths, None]]
        self.adapters.append(None)

    def ask_all(self, gang: AdapterGang, **fields: Any) -> None:
        """Both prompts with every adapter, all at once and mixed."""
        names = [[gang.ask(prompt, each, NUM_TOKENS, **fields) for each in self.adapters] for prompt in self.prompts]
        for number, of_prompt in enumerate(names):
            assert gang.wait(of_prompt) == [expected[number] for expected in self.expected]


@pytest.fixture(scope="module", params=["llama_tied_9_over_3", "qwen3"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(request.param, tmp_path_factory.mktemp(request.param))


def test_adapters_answer_differently(setup: Setup) -> None:
    assert len({tuple(expected[0]) for expected in setup.expected}) > len(VARIANTS) // 2


@pytest.mark.parametrize(("size", "num_stages"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_a_mixed_batch(setup: Setup, size: int, num_stages: int) -> None:
    with AdapterGang(setup.model_path, size, num_stages, max_num_tokens=96) as gang:
        setup.ask_all(gang)
        setup.ask_all(gang)  # prefixes are cached now, each adapter's under its own root
        assert gang.gauges()["adapter_loads_total"] == len(VARIANTS)


def test_prefill_and_decode_apart(setup: Setup) -> None:
    knobs: dict[str, Any] = {"cache_transceiver_config": {"backend": "TCP"}}
    with AdapterGang(setup.model_path, 1, **knobs) as prefill, AdapterGang(setup.model_path, 2, **knobs) as decode:
        names = [
            answer_apart(prefill, decode, f"{n}", setup.prompts[0], adapter) for n, adapter in enumerate(setup.adapters)
        ]
        assert decode.wait(names) == [expected[0] for expected in setup.expected]
        gauges = decode.gauges()
        assert gauges["kv_transfer_bytes_total"] > 0
        assert gauges["kv_transfer_recomputed_tokens_total"] == 0


def test_speculation(setup: Setup) -> None:
    config = NGramDecodingConfig(max_draft_len=4, max_matching_ngram_size=2, is_public_pool=True)
    with AdapterGang(setup.model_path, speculative_config=config) as gang:
        for _ in range(2):
            setup.ask_all(gang)


def test_few_in_memory_and_in_a_step(setup: Setup) -> None:
    with AdapterGang(setup.model_path, lora_config={"max_loras": 2, "max_cpu_loras": 3}) as gang:
        setup.ask_all(gang)
        assert gang.gauges()["adapters_in_memory"] <= 3
