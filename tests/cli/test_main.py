"""The command line itself: help that works, mistakes that are named, versions and models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorweave.cli.main import build_parser, main
from tensorweave.cli.serve import config_changes, config_path

COMMANDS = [
    ["serve"],
    ["chat"],
    ["batch"],
    ["eval"],
    ["bench", "throughput"],
    ["bench", "latency"],
    ["bench", "serve"],
    ["bench", "link"],
    ["bench", "overhead"],
    ["chaos"],
    ["models", "fetch"],
    ["version"],
]


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: tensorweave" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_ray() -> None:
    script = "import sys; from tensorweave.cli.main import build_parser; build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "ray", "transformers"} & set(loaded.stdout.split())


@pytest.mark.parametrize(
    "line", [["serv"], ["bench"], ["bench", "throughput"], ["bench", "serve", "--concurrency", "0"]]
)
def test_a_wrong_line_exits_with_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_wrong_key_is_named_with_file_value_and_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("model: smollm2\nrouter:\n  prot: 9000\n")
    assert main(["serve", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "service.yaml:3" in error
    assert "prot" in error
    assert "'port'" in error
    assert "Traceback" not in error


def test_a_wrong_change_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--set", "router.port=many"]) == 2
    error = capsys.readouterr().err
    assert "--set router.port=many" in error
    assert main(["serve", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_traceback_is_there_on_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        main(["--traceback", "serve", "--config", str(tmp_path / "absent.yaml")])


def test_serve_takes_any_path_as_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorweave.deploy.config import load_config

    args = build_parser().parse_args(["serve", "--model", "/data/my: model", "--set", "router.port=9000"])
    config = load_config(config_path(args.config), config_changes(args))
    assert (config.model, config.model_name, config.router.port) == ("/data/my: model", "my: model", 9000)


def test_version_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["tensorweave", "ray", "torch", "transformers", "python"]


def test_models_are_listed_and_unknown_ones_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "smollm2-135m-instruct, smollm2  (Apache-2.0; absent)",
        "smollm2-135m-instruct-q4_1, smollm2-gguf  (Apache-2.0; absent)",
    ]
    assert main(["models", "fetch", "gpt-17"]) == 2
    assert "unknown model 'gpt-17'; known: smollm2-135m-instruct" in capsys.readouterr().err
    assert main(["models", "path", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path.resolve())


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr("sys.stderr", open("/dev/null", "w"))  # noqa: SIM115  main closes it
    assert main(["version"]) == 1
