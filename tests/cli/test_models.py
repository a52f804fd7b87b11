"""`tensorweave models save` makes an engine directory, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorweave.cli.main import main
from tensorweave.workers.engine_dir.manifest import EngineManifest
from tests.workers.tiny_models import make_model


def test_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama", tmp_path / "model")
    line = ["models", "save", str(tmp_path / "model"), str(tmp_path / "engine")]
    assert main([*line, "--tensor-parallel-size", "2", "--dtype", "bfloat16", "--quantization", "fp8"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "engine")
    manifest = EngineManifest.read(tmp_path / "engine")
    assert manifest is not None
    assert (manifest.tensor_parallel_size, manifest.dtype, manifest.quantization) == (2, "bfloat16", "fp8")
    out = str(tmp_path / "integers")
    assert main(["models", "save", str(tmp_path / "model"), out, "--quantization", "w4a16"]) == 0
    assert capsys.readouterr().out.strip() == out
    manifest = EngineManifest.read(tmp_path / "integers")
    assert manifest is not None
    assert manifest.quantization == "w4a16_g32"
    assert main(line) != 0
    assert "is there already; give a new or an empty directory" in capsys.readouterr().err
    assert main(["models", "save", str(tmp_path / "model"), str(tmp_path / "x"), "--tensor-parallel-size", "0"]) != 0
    assert "must be at least 1" in capsys.readouterr().err
