"""What a checkpoint's generation_config.json says: end ids, sampling defaults, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig as TheirGenerationConfig

from tensorweave.cluster.protocol import SamplingDefaults
from tensorweave.workers.build import check_model
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.generation_config import (
    GenerationConfig,
    load_generation_config,
    load_sampling_defaults,
)
from tests.workers.engine_drive import engine_args
from tests.workers.tiny_models import make_model, rewrite_config

QWEN: dict[str, Any] = {
    "bos_token_id": 1,
    "pad_token_id": 1,
    "do_sample": True,
    "eos_token_id": [7, 1],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
OF_QWEN = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)


def read(**fields: Any) -> SamplingDefaults:
    return GenerationConfig(fields, "some/generation_config.json").sampling_defaults()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"eos_token_id": 2, "_from_model_config": True, "use_cache": True, "max_length": 20}, SamplingDefaults()),
        (QWEN, OF_QWEN),
        ({"do_sample": True}, SamplingDefaults(temperature=1.0)),
        ({"do_sample": True, "min_p": 0.1, "top_k": 0}, SamplingDefaults(temperature=1.0, min_p=0.1, top_k=0)),
        (
            {**QWEN, "do_sample": False, "max_new_tokens": 9},
            SamplingDefaults(temperature=0.0, repetition_penalty=1.05, max_tokens=9),
        ),
        ({"temperature": 0}, SamplingDefaults(temperature=0.0)),
        ({"no_repeat_ngram_size": 3}, SamplingDefaults(no_repeat_ngram_size=3)),
    ],
)
def test_sampling_defaults(fields: dict[str, Any], expected: SamplingDefaults) -> None:
    assert read(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; supported: a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; supported"),
        ({"top_p": 1.5}, "top_p is 1.5; supported: a number of at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; supported: a number above 0"),
        ({"top_k": 2.5}, "top_k is 2.5; supported: a whole number of at least -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; supported: a whole number of at least 1"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; supported: true or false"),
        ({"num_beams": 4}, "num_beams is 4, which is not supported as a default; take it out of the file, or set"),
        ({"typical_p": 0.9}, "typical_p is 0.9, which is not supported"),
        ({"suppress_tokens": [5]}, r"suppress_tokens is \[5\], which is not supported"),
        ({"min_new_tokens": 5}, "min_new_tokens is 5, which is not supported"),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"some/generation_config.json: {message}"):
        read(**fields)


def test_values_that_switch_a_feature_off_are_no_matter() -> None:
    """What transformers 4 wrote in full, and what transformers 5 writes."""
    old = {"num_beams": 1, "num_beam_groups": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "penalty_alpha": None}
    assert read(**old, diversity_penalty=0.0, encoder_repetition_penalty=1.0) == SamplingDefaults()
    assert read(**json.loads(TheirGenerationConfig().to_json_string(use_diff=False))) == SamplingDefaults()


def write_small(path: Path, fields: dict[str, Any]) -> Path:
    make_model("llama", path)
    (path / "generation_config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("backend", ["pytorch", "_autodeploy"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_every_backend_tells_ends_and_defaults(backend: str, load_format: str, tmp_path: Path) -> None:
    from tensorweave.workers.autodeploy.loader import load_autodeploy

    path = write_small(tmp_path, {**QWEN, "eos_token_id": [7, 1, 9999]})
    load = load_autodeploy if backend == "_autodeploy" else load_engine
    args = engine_args(path, backend=backend, load_format=load_format, generation_config="auto")
    with torch.random.fork_rng(devices=[]):
        info = load(args, SoloComm()).info
    assert info.end_ids == (1, 2, 7)  # config.json's 2 among them; one outside the vocabulary never comes
    assert info.sampling_defaults == OF_QWEN
    if load_format == "auto":
        for switch in ("none", "trtllm"):
            plain = load(engine_args(path, backend=backend, generation_config=switch), SoloComm()).info
            assert (plain.end_ids, plain.sampling_defaults) == ((1, 2, 7), SamplingDefaults())


def test_an_engine_directory_keeps_them(tmp_path: Path) -> None:
    path = write_small(tmp_path / "model", QWEN)
    save_engine_dir(path, tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    info = load_engine(engine_args(tmp_path / "engine", generation_config="auto"), SoloComm()).info
    assert (info.end_ids, info.sampling_defaults) == ((1, 2, 7), OF_QWEN)


def test_config_json_stands_in_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    """As in transformers and vLLM: old checkpoints keep sampling fields in config.json."""
    make_model("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    rewrite_config(tmp_path, lambda fields: fields.update(temperature=0.6, top_p=0.9))
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults(temperature=0.6, top_p=0.9)
    assert load_sampling_defaults(tmp_path, "none") == SamplingDefaults()
    assert load_generation_config(tmp_path).end_ids == (2,)


def test_a_model_is_checked_for_it_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write_small(tmp_path, {"num_beams": 3})
    check_model(engine_args(path))
    with pytest.raises(ValueError, match=r"generation_config\.json: num_beams is 3"):
        check_model(engine_args(path, generation_config="auto"))
