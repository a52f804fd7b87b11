"""What a release depends on: one version, a license, and all files of the rooms in the wheel."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tensorweave
from tensorweave.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cluster", "workers", "router", "kernels", "deploy", "tensorweave")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tensorweave.__version__"}
    assert main(["version"]) == 0
    assert f"tensorweave {tensorweave.__version__}\n" in capsys.readouterr().out


def test_the_changelog_has_this_version() -> None:
    """The first release below Unreleased is what the package says that it is."""
    headings = re.findall(
        r"^## \[([^\]]+)\](?: - \d{4}-\d\d-\d\d)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert headings[:2] == ["Unreleased", tensorweave.__version__]


def test_the_license_is_the_one_that_is_declared() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert PYPROJECT["project"]["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_requirement_is_installed_in_a_tested_version() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no line in constraints.txt"
        assert requirement.specifier.contains(version), (
            f"constraints.txt: {requirement.name}=={version}, not {requirement}"
        )


def test_no_extra_makes_ray_start_slowly() -> None:
    """Ray imports jsonschema in each of its processes, and jsonschema what checks formats: rfc3987-syntax, which its
    extra brings, takes 0.85 s."""
    for texts in PYPROJECT["project"]["optional-dependencies"].values():
        for requirement in map(Requirement, texts):
            assert requirement.name != "rfc3987-syntax"
            assert requirement.name != "jsonschema" or not requirement.extras


def test_every_file_of_the_rooms_is_packaged() -> None:
    """setuptools takes the Python files of the packages; all others must match `package-data`."""
    globs = PYPROJECT["tool"]["setuptools"]["package-data"]["tensorweave"]
    packaged = {path.resolve() for glob in globs for path in (ROOT / "tensorweave").glob(glob)}
    packaged |= {path.resolve() for top in ("kernels", "deploy") for path in _matching(top, globs)}
    files = {
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(path.suffix == ".c" for path in packaged)
    assert sorted(str(path.relative_to(ROOT)) for path in files - packaged if path.suffix != ".py") == []


def _matching(room: str, globs: list[str]) -> list[Path]:
    """Before Python 3.13, `Path.glob` follows no links: what lies below `room/` is looked for in the room itself."""
    inner = [glob.removeprefix(f"{room}/") for glob in globs if glob.startswith(f"{room}/")]
    return [path for glob in inner for path in (ROOT / room).glob(glob)]
