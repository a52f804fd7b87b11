"""What is left to the device is decided by it; what is given stays."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.step_settings import StepSettings


def test_defaults_are_those_of_the_device() -> None:
    args = TorchLlmArgs(model="m")
    assert StepSettings.of(args, "cuda") == StepSettings(512, 8192, 2048, balances_prompts=True, overlaps=True)
    assert StepSettings.of(args, "cpu") == StepSettings(256, 2048, 2048, balances_prompts=False, overlaps=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("disabled", [True, False])
def test_what_is_given_stays(device: str, disabled: bool) -> None:
    knobs: dict[str, Any] = {"scheduler_config": {"max_prompt_tokens_beside_decodes": 4}}
    args = TorchLlmArgs(model="m", max_batch_size=3, max_num_tokens=5, disable_overlap_scheduler=disabled, **knobs)
    assert StepSettings.of(args, device) == StepSettings(3, 5, 4, balances_prompts=False, overlaps=not disabled)
