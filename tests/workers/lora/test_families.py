"""Adapters of every family: fused tensors, norms behind products, mixtures. Tokens are those of transformers with the
adapter merged by peft; what is not computed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorweave.cluster.errors import RequestRejected
from tensorweave.workers.lora.peft_directory import CONFIG, WEIGHTS
from tests.workers.engine_drive import random_prompts
from tests.workers.lora.adapter_gang import AdapterGang, adapter_at
from tests.workers.lora.peft_adapters import save_adapter, their_answers
from tests.workers.tiny_models import make_model

NUM_TOKENS = 5
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = {"r": 6, "target_modules": ["qkv_proj", "gate_up_proj"], "use_rslora": True}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "phi3_window": [FUSED, {"target_modules": ["down_proj", "o_proj"]}],
    "phi4_mini": [FUSED],
    "glm": [{"target_modules": ["k_proj", "gate_up_proj"]}],
    "glm4": [{"target_modules": ["q_proj", "gate_up_proj"], "rank_pattern": {"gate_up_proj": 11}}],
    "granite": [{"target_modules": ["v_proj", "gate_proj"]}],
    "granite4": [{"target_modules": ["input_linear"]}, {"target_modules": ["v_proj", "output_linear"]}],
    "smollm3": [{"target_modules": ATTENTION}],
    "olmo2": [{"target_modules": ["q_proj", "k_proj"]}],
    "olmo3": [{"target_modules": ["q_proj", "up_proj"]}],
    "gemma2": [{"r": 16, "target_modules": ["q_proj", "up_proj"], "lora_alpha": 64}],
    "gemma3": [{"target_modules": ["k_proj", "gate_proj"]}],
    "mixtral": [{"target_modules": ATTENTION}],
    "qwen2_moe_some_dense": [{"target_modules": ["gate_proj", "up_proj", "shared_expert_gate"]}],
    "qwen3_moe": [{"target_modules": ATTENTION, "layers_to_transform": [0, 2]}],
    "gpt_oss": [{"target_modules": ["q_proj", "o_proj"]}],
}
HAS_EXPERTS_IN_ALL_LINEAR = {"mixtral", "qwen3_moe"}
"""Of these, peft takes experts and routers as well."""


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path / "model")
    fields = [*VARIANTS[name], *([] if name in HAS_EXPERTS_IN_ALL_LINEAR else [{"target_modules": "all-linear"}])]
    paths = [tmp_path / str(number) for number in range(len(fields))]
    for number, (path, each) in enumerate(zip(paths, fields, strict=True)):
        save_adapter(model, path, number, **{"r": 4, **each})
    [prompt] = random_prompts(1, 60, seed=7)
    expected = [their_answers(model, path, [prompt], NUM_TOKENS)[0] for path in (*paths, None)]
    assert len({tuple(each) for each in expected}) == len(expected)
    adapters = [*(adapter_at(path) for path in paths), None]
    for size in (1, 2):
        with AdapterGang(tmp_path / "model", size, max_num_tokens=96) as gang:
            assert gang.wait([gang.ask(prompt, adapter, NUM_TOKENS) for adapter in adapters]) == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_adapters_of_experts_and_routers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path / "model")
    save_adapter(model, tmp_path / "stacked", 0, target_parameters=["mlp.experts.gate_up_proj"])
    save_adapter(model, tmp_path / "plain", 0, target_modules=["q_proj"])
    [module] = {key.split(".lora_")[0] for key in load_file(tmp_path / "plain" / WEIGHTS) if ".0." in key}
    refused = {"stacked": "target_parameters is"}
    for own in ("mlp.experts.1.gate_proj", "mlp.gate"):  # as those that were trained with transformers 4 have them
        of_own = module.replace("self_attn.q_proj", own)
        write_with(tmp_path / "plain", tmp_path / own, {of_own: (model.config.hidden_size, 5)})
        refused[own] = f"has {of_own.removeprefix('base_model.model.')}, which is no linear layer"
    with AdapterGang(tmp_path / "model") as gang:
        for path, says in refused.items():
            with pytest.raises(RequestRejected, match=says):
                gang.leader.load_adapter(path, str(tmp_path / path))


def write_with(source: Path, path: Path, modules: dict[str, tuple[int, int]]) -> None:
    """The adapter at `source` with more modules, of these numbers of inputs and outputs, and of rank 4."""
    config, tensors = json.loads((source / CONFIG).read_text()), load_file(source / WEIGHTS)
    for module, (num_inputs, num_outputs) in modules.items():
        config["target_modules"].append(module.rsplit(".", 1)[1])
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, num_inputs)
        tensors[f"{module}.lora_B.weight"] = torch.randn(num_outputs, 4)
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, path / WEIGHTS)
