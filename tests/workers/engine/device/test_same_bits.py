"""In bfloat16 on Hopper, logits of a sequence that decodes are the same bits in any step of 2 to 16 decodes, as long as
its cached keys and values are: products and attention of so few rows sum in one order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import can_run_hopper_kernels
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tests.workers.engine.device.test_engine import device_engine
from tests.workers.engine_drive import ScatteredBlocks, logits_of, make_request
from tests.workers.tiny_models import VOCAB, make_model

WIDE = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "head_dim": 64}
NUM_SEQUENCES = 16
NUM_STEPS = 3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not can_run_hopper_kernels(torch.device("cuda", 0)), reason="no Hopper GPU"
    ),
]


def decode(engine: Any, prompts: list[list[int]], answers: list[list[int]], groups: list[list[int]]) -> list[Tensor]:
    """Logits [steps, V] of each sequence whose answer is given. Each prompt is computed in a step of its own, the
    sequences of a group decode together."""
    resources: Any = ScatteredBlocks(engine.info.num_blocks, engine.info.tokens_per_block, seed=len(groups))
    requests = [make_request(number, prompt) for number, prompt in enumerate(prompts)]
    for request in requests:
        logits_of(engine, ScheduledBatch((StepRow.of_context(request, 0, len(request.tokens)),)), resources)
    told: list[list[Tensor]] = [[] for _ in prompts]
    for step in range(NUM_STEPS):
        for number, request in enumerate(requests):
            request.tokens.append(answers[number][step])
        for group in groups:
            rows = tuple(StepRow(requests[i], len(requests[i].tokens) - 1, 1, 1) for i in group)
            logits = logits_of(engine, ScheduledBatch((), rows), resources).clone()
            for i, row in zip(group, logits, strict=True):
                told[i].append(row)
    for request in requests:
        for manager in engine.resource_managers:
            manager.free_resources(request)
    return [torch.stack(rows) for rows in told]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_of_a_decode_are_the_same_in_any_small_batch(family: str, graphs: bool, tmp_path: Path) -> None:
    make_model(family, tmp_path, **WIDE)
    knobs = {} if graphs else {"cuda_graph_config": None}
    engine = device_engine(tmp_path, dtype="bfloat16", device="cuda", max_batch_size=NUM_SEQUENCES, **knobs)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in rng.sample(range(1, 500), NUM_SEQUENCES)]
    answers = [[rng.randrange(3, VOCAB) for _ in range(NUM_STEPS)] for _ in prompts]
    everyone = list(range(NUM_SEQUENCES))
    pairs = decode(engine, prompts, answers, [everyone[i : i + 2] for i in range(0, NUM_SEQUENCES, 2)])
    assert torch.isfinite(torch.stack(pairs)).all()
    for size in (2, 4, 8, 14, 16):
        rng.shuffle(everyone)
        together = decode(engine, prompts, answers, [everyone[i : i + size] for i in range(0, NUM_SEQUENCES, size)])
        wrong = [i for i in everyone if not torch.equal(pairs[i], together[i])]
        assert wrong == [], f"in steps of {size}"
    alone = decode(engine, prompts, answers, [[i] for i in everyone])
    difference = torch.stack(alone) - torch.stack(pairs)
    assert difference.abs().max() < 0.2, "one row is computed by other kernels, to other bits"
