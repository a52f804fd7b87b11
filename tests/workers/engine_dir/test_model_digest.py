"""`model_digest`: equal for copies of a model, different for different models."""

from __future__ import annotations

from pathlib import Path

from tensorweave.workers.engine_dir.model_digest import model_digest
from tests.workers.tiny_models import make_model, rewrite_config


def test_a_model_digest_tells_models_apart(tmp_path: Path) -> None:
    digests = set()
    for name, seed in (("one", 0), ("copy", 0), ("other weights", 1)):
        make_model("llama", tmp_path / name, seed=seed)
        digests.add(model_digest(tmp_path / name))
    assert len(digests) == 2
    rewrite_config(tmp_path / "copy", lambda fields: fields.update(rope_theta=5.0))
    assert model_digest(tmp_path / "copy") not in digests
