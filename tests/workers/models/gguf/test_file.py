"""GGUF files as models: every matrix in its own form, and the tokens of transformers with the dequantized weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tensorweave.kernels.weights import GroupedFloatWeight, GroupedWeight
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.gguf.file import GgufFile
from tensorweave.workers.models.gguf.loader import GgufLoader
from tensorweave.workers.models.rank_weights import TensorRows
from tensorweave.workers.models.tensor_names import EMBEDDING
from tensorweave.workers.store.gguf_families import llama3_factors
from tensorweave.workers.store.model_store import pin_model, resolve_model
from tests.workers.engine_drive import engine_args, generate_on_ranks, random_prompts
from tests.workers.store.gguf_models import write_gguf_model
from tests.workers.tiny_models import their_greedy

MIXED = {"attn_v": "Q6_K", "ffn_down": "Q5_0", "token_embd": "Q8_0", "output": "Q6_K"}
LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def of_a_mixture(name: str) -> str:
    """As llama.cpp's Q4_K_M: several kinds in one file, in one fused matrix too."""
    return next((kind for part, kind in MIXED.items() if part in name), "Q4_K")


@pytest.mark.parametrize(
    ("kind", "family", "size", "changes"),
    [
        ("Q4_0", "llama", 1, {}),
        ("Q4_1", "qwen2", 2, {}),
        ("Q8_0", "qwen3", 2, {"tie_word_embeddings": True, "head_dim": 32}),
        ("Q5_1", "llama", 3, {"tie_word_embeddings": True}),
        ("F16", "qwen2", 1, {}),
        ("BF16", "llama", 2, {}),
        ("F32", "qwen3", 1, {"head_dim": 32}),
    ],
)
def test_tokens_of_one_kind(kind: str, family: str, size: int, changes: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    model = write_gguf_model(file, lambda name: kind, family=family, **changes)
    prompts = random_prompts(3, 30)
    assert generate_on_ranks(file, size, prompts, 6) == their_greedy(model, prompts, 6)


def test_phi_3s_fused_matrices_windows_and_partial_rotation(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(29)
        writer.add_rope_dimension_count(32)

    file = tmp_path / "model.gguf"
    rope = {"rope_theta": 1e5, "rope_type": "default", "partial_rotary_factor": 0.5}
    model = write_gguf_model(file, of_a_mixture, family="phi3_window", add=add, rope_parameters=rope)
    prompts = random_prompts(3, 60)
    assert generate_on_ranks(file, 2, prompts, 6) == their_greedy(model, prompts, 6)


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_of_a_mixture_of_kinds(size: int, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    model = write_gguf_model(file, of_a_mixture, num_key_value_heads=2)
    prompts = random_prompts(3, 30)
    assert generate_on_ranks(file, size, prompts, 6) == their_greedy(model, prompts, 6)


def test_llama_3s_rotation_is_found_by_its_factors(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    factors = llama3_factors(5e5, 64, 8.0, 1.0, 4.0, 8192).astype(np.float32)
    model = write_gguf_model(
        file,
        lambda name: "Q8_0",
        add=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
        rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192},
        max_position_embeddings=16384,
    )
    prompts = random_prompts(2, 300)
    assert generate_on_ranks(file, 1, prompts, 6) == their_greedy(model, prompts, 6)


def test_every_matrix_in_its_own_form(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    model = write_gguf_model(
        file, lambda name: "MXFP4" if "ffn" in name else of_a_mixture(name), tie_word_embeddings=True
    )
    weights = dict(model.named_parameters())
    with_blocks = GgufLoader(GgufFile(resolve_model(file)), torch.float32)
    q, k, v = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    qkv = with_blocks.matrix_rows(
        [
            TensorRows(q, (256, 256), range(64, 192)),
            TensorRows(k, (128, 256), range(64)),
            TensorRows(v, (128, 256), range(64)),
        ]
    )
    assert isinstance(qkv, GroupedWeight)
    assert torch.equal(qkv.rows(), torch.cat([weights[q][64:192], weights[k][:64], weights[v][:64]]))
    down = "model.layers.0.mlp.down_proj.weight"
    part = with_blocks.matrix_columns(down, (256, 512), range(160, 512))
    assert isinstance(part, GroupedFloatWeight)
    assert torch.equal(part.rows(), weights[down][:, 160:])
    embedding = with_blocks.rows([TensorRows(EMBEDDING, (211, 256), range(50, 211))])
    head = with_blocks.tied_head(embedding)
    assert isinstance(head, GroupedWeight)
    assert torch.equal(embedding, weights[EMBEDDING][50:])
    assert torch.equal(head.rows(), embedding)


def test_a_file_that_changed_is_indexed_again(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_model(file, lambda name: "Q8_0")
    first, digest = resolve_model(file), model_digest(resolve_model(file))
    assert (resolve_model(str(file)), pin_model(file).name) == (first, str(file))
    write_gguf_model(file, lambda name: "Q8_0", seed=1)
    assert resolve_model(file) != first
    assert model_digest(resolve_model(file)) != digest
    with file.open("ab") as stored:
        stored.write(b"\0")
    with pytest.raises(ValueError, match=r"model\.gguf has \d+ bytes, and had \d+ when it was indexed"):
        GgufFile(first)
    os.remove(file)
    with pytest.raises(ValueError, match=r"model\.gguf cannot be read: No such file"):
        GgufFile(first)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_expert_count(8), r"llama\.expert_count is '8', which is not supported"),
        (
            lambda w: w.add_value_length(32),
            r"llama\.attention\.value_length is '32'; supported: the size of a head \(64\)",
        ),
        (
            lambda w: w.add_rope_dimension_count(32),
            r"llama\.rope\.dimension_count is '32'; supported: the size of a head",
        ),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            r"rope\.scaling\.type is 'longrope'; supported",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(32, np.float32) * 3),
            r"rope_freqs\.weight is of none of the",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
            r"the tensor blk\.0\.attn_sinks\.weight",
        ),
        (lambda w: w.add_add_eos_token(True), r"tokenizer\.ggml\.add_eos_token is 'True'; supported: False"),
        (lambda w: w.add_uint32("split.count", 2), r"split\.count is '2'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(add: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_model(file, lambda name: "Q8_0", add=add, num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        resolve_model(file)


def test_kinds_that_are_not_read_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_model(file, lambda name: "TQ2_0" if "ffn_up" in name else "Q8_0", num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"model\.gguf: the tensor model\.layers\.0\.mlp\.up_proj\.weight is TQ2_0; supp"
    ):
        load_engine(engine_args(file), SoloComm())


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf_model(file, lambda name: "Q8_0", num_hidden_layers=1)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.gguf (ends within the tensor|is not a GGUF file)"):
        resolve_model(file)
    file.write_bytes(b"GGUX" + whole[4:])
    with pytest.raises(ValueError, match=r"model\.gguf is not a GGUF file that can be read"):
        resolve_model(file)
