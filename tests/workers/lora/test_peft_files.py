"""PEFT directories: what is read as PEFT reads it, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tensorweave.cluster.adapter import Adapter
from tensorweave.kernels.lora.reference import ReferenceAdapters
from tensorweave.workers.lora.peft_config import PeftConfig
from tensorweave.workers.lora.peft_directory import DigestCache, PeftFiles
from tensorweave.workers.lora.rank_adapter import AdapterLimits, AdapterReader
from tensorweave.workers.models.adapter_sites import SitePart
from tests.workers.lora.peft_adapters import VARIANTS, save_adapter
from tests.workers.tiny_models import make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def linears(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    found = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    return {name: tuple(each.weight.shape) for name, each in found.items() if name != "lm_head"}


def reader(model: PreTrainedModel, limits: AdapterLimits) -> AdapterReader:
    sites = [
        (SitePart(name, outputs, inputs, range(outputs), range(inputs), 0),)
        for name, (outputs, inputs) in linears(model).items()
    ]
    return AdapterReader(sites, ReferenceAdapters(CPU), torch.float32, CPU, limits)


def test_tensors_of_other_pipeline_stages_are_checked_and_left_out(model: PreTrainedModel, tmp_path: Path) -> None:
    save_adapter(model, tmp_path, 0)
    files, whole = PeftFiles.read(tmp_path), reader(model, AdapterLimits(64))
    near, far = whole.sites[:7], whole.sites[7:]
    stage = replace(whole, sites=near, sites_elsewhere=far)
    stage.check(files)
    packed = stage.read(Adapter("a", files.digest, str(tmp_path))).packed
    assert len(packed) == len(near)
    with pytest.raises(ValueError, match="which is no linear layer of this model"):
        replace(whole, sites=near).check(files)


@pytest.mark.parametrize("fields", VARIANTS, ids=range(len(VARIANTS)))
def test_targets_ranks_and_scales_are_those_of_peft(
    model: PreTrainedModel, fields: dict[str, Any], tmp_path: Path
) -> None:
    save_adapter(model, tmp_path, 0, **fields)
    config = PeftConfig.parse(PeftFiles.read(tmp_path).config)
    theirs = get_peft_model(make_model("llama", tmp_path / "model"), LoraConfig(**{"lora_alpha": 16, **fields}))
    expected = {
        name.removeprefix("base_model.model."): (each.r["default"], each.scaling["default"])
        for name, each in theirs.named_modules()
        if hasattr(each, "lora_A") and hasattr(each, "scaling")
    }
    ours = {name: (config.rank_of(name), config.scale_of(name)) for name in linears(model) if config.changes(name)}
    assert ours == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora is True: it is not computed here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base model"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"of_the_future": {"a": 1}}, "of_the_future"),
        ({"r": 0}, "r is 0, must be an integer from 1"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"target_modules": "("}, r"target_modules has '\('"),
        ({"target_modules": None}, "target_modules is None"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has"),
        ({"rank_pattern": [4]}, "rank_pattern is"),
        ({"layers_to_transform": ["first"]}, "layers_to_transform has 'first'"),
        (
            {"target_modules": ".*", "layers_to_transform": [1]},
            "layers_to_transform is for target_modules that are a list",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    fields = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **change}
    with pytest.raises(ValueError, match=words):
        PeftConfig.parse(json.dumps(fields).encode())


def test_a_config_is_a_json_object() -> None:
    for text in (b"{", b"[]", b"\xff"):
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            PeftConfig.parse(text)


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    """`tensors` by names with '__' for '.'; None takes one out."""
    file = path / "adapter_model.safetensors"
    known = load_file(file)
    for name, tensor in tensors.items():
        full = f"base_model.model.{name.replace('__', '.')}"
        if tensor is None:
            del known[full]
        else:
            known[full] = tensor
    save_file(known, file)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model__embed_tokens__lora_embedding_A": torch.ones(8, 211)}, "which is neither A nor B of a linear layer"),
        ({"lm_head__lora_A__weight": torch.ones(8, 48)}, "has lm_head, which is no linear layer of this model"),
        ({"model__layers__0__mlp__up_proj__lora_A__weight": torch.ones(8, 48)}, "not among target_modules"),
        ({"model__layers__0__self_attn__q_proj__lora_A__weight": None}, "has no lora_A of model.layers.0"),
        (
            {"model__layers__1__self_attn__q_proj__lora_A__weight": torch.ones(8, 47)},
            r"is \[8, 47\], must be \[8, 48\]",
        ),
        (
            {"model__layers__1__self_attn__q_proj__lora_B__weight": torch.ones(48, 4)},
            r"is \[48, 4\], must be \[48, 8\]",
        ),
        (
            {"model__layers__1__self_attn__q_proj__lora_B__weight": torch.full((48, 8), float("inf"))},
            "lora_B of model.layers.1.self_attn.q_proj has numbers that are not finite",
        ),
        (
            {
                "model__layers__2__self_attn__q_proj__lora_A__weight": None,
                "model__layers__2__self_attn__q_proj__lora_B__weight": None,
            },
            "target_modules has model.layers.2.self_attn.q_proj, and",
        ),
    ],
)
def test_tensors_that_do_not_fit(model: PreTrainedModel, tensors: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_adapter(model, tmp_path, 0, r=8, target_modules=["q_proj"])
    checks = reader(model, AdapterLimits(64))
    checks.check(PeftFiles.read(tmp_path))
    rewrite(tmp_path, **tensors)
    with pytest.raises(ValueError, match=words):
        checks.check(PeftFiles.read(tmp_path))


def test_limits(model: PreTrainedModel, tmp_path: Path) -> None:
    save_adapter(model, tmp_path, 0, r=8, target_modules=["q_proj", "up_proj"])
    files = PeftFiles.read(tmp_path)
    reader(model, AdapterLimits(8, ("q_proj", "mlp.up_proj"))).check(files)
    with pytest.raises(ValueError, match="rank 8, over the limit of 7"):
        reader(model, AdapterLimits(7)).check(files)
    with pytest.raises(ValueError, match="up_proj is not among lora_target_modules: q_proj"):
        reader(model, AdapterLimits(8, ("q_proj",))).check(files)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no PEFT adapter can be read"):
        PeftFiles.read(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"adapter_model\.bin, which is never read"):
        PeftFiles.read(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    (tmp_path / "adapter_config.json").write_text('{"target_modules": ["q_proj"]}')
    with pytest.raises(ValueError, match="cannot be read"):
        PeftFiles.read(tmp_path).parse()


def test_a_directory_is_read_again_where_it_has_changed(model: PreTrainedModel, tmp_path: Path) -> None:
    save_adapter(model, tmp_path, 0, r=8, target_modules=["q_proj"])
    digests = DigestCache()
    first = digests.find("a", str(tmp_path))
    assert digests.find("b", str(tmp_path)).digest == first.digest
    save_adapter(model, tmp_path, 1, r=8, target_modules=["q_proj"])
    second = digests.find("a", str(tmp_path))
    assert second.digest == PeftFiles.read(tmp_path).digest != first.digest
    with pytest.raises(ValueError, match="no PEFT adapter"):
        digests.find("a", str(tmp_path / "missing"))
