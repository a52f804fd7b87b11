"""Tensors that a checkpoint need not have must be what its config.json determines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tests.workers.engine_drive import engine_args, generate_on_ranks, random_prompts
from tests.workers.tiny_models import make_model, rewrite_config, their_greedy

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
METADATA = {"format": "pt"}


def tied_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of a tied model that also has a head and the old rotation buffer, as the config determines them."""
    make_model("llama_tied_9_over_3", path)
    with SafetensorsDirectory(path) as source:
        tensors = {name: source.read(name).clone() for name in source.shapes}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[INV_FREQ] = (10_000.0 ** -(torch.arange(0, 8, 2) / 8)).bfloat16()
    return tensors


def test_tied_models_may_carry_a_head(tmp_path: Path) -> None:
    save_file(tied_tensors(tmp_path), tmp_path / "model.safetensors")
    assert load_engine(engine_args(tmp_path), SoloComm()).info.vocab_size == 211


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.weight", r"lm_head.weight differs from model.embed_tokens.weight, and config.json says tie_word"),
        (INV_FREQ, "rotary_emb.inv_freq is not the rotation that config.json describes"),
    ],
)
def test_what_the_config_determines_is_compared(name: str, message: str, tmp_path: Path) -> None:
    tensors = tied_tensors(tmp_path)
    tensors[name][-1] *= 2
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_engine(engine_args(tmp_path), SoloComm())


def test_an_untied_config_uses_the_head(tmp_path: Path) -> None:
    """The remedy that the refusal names: transformers' own model with that head is the oracle."""
    tensors = tied_tensors(tmp_path)
    tensors["lm_head.weight"] = torch.randn(tensors["lm_head.weight"].shape, generator=torch.Generator().manual_seed(3))
    save_file({name: t for name, t in tensors.items() if name != INV_FREQ}, tmp_path / "model.safetensors", METADATA)
    rewrite_config(tmp_path, lambda fields: fields.update(tie_word_embeddings=False))
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    prompts = random_prompts(2, 20)
    assert generate_on_ranks(tmp_path, 1, prompts, 4) == their_greedy(model, prompts, 4)
