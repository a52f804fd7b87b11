"""Ray's private parts are used in one file, with the versions of Ray that were tested, and do what we need."""

from __future__ import annotations

import ast
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.serve._private import http_util

from tensorweave.cluster.ray_internals import UntestedRay, allow_rebinding, check_version
from tests.parsed import parsed

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"ray(\.serve)?\._\w+|ray\.core\b")


@pytest.mark.parametrize("version", ["2.60.0", "2.60.3", "2.60.1rc0"])
def test_tested_versions_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["2.59.9", "2.61.0", "3.0.0.dev0", "3.0", "nightly"])
def test_other_versions_are_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(
        UntestedRay, match=rf"Ray {re.escape(version)} is installed; .*pip install 'ray\[serve\]>=2.60,<2.61'"
    ):
        check_version(version)


def test_the_package_asks_for_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [line for line in project["dependencies"] if line.startswith("ray[")]
    with pytest.raises(UntestedRay) as refusal:
        check_version("1.0")
    assert f"'{wanted}'" in str(refusal.value)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_private_parts_are_used_in_one_file() -> None:
    files = [
        path
        for room in ("cluster", "deploy", "router", "workers", "tensorweave/cli")
        for path in (ROOT / room).rglob("*.py")
    ]
    users = {
        path.relative_to(ROOT)
        for path in files
        if any(PRIVATE.match(name) for name in imported(parsed(path.read_text(encoding="utf-8"))))
    }
    assert users == {Path("cluster/ray_internals.py")}


def test_a_replica_can_bind_a_port_in_time_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_util, "socket", socket)  # restores it afterwards
    allow_rebinding()
    with http_util.socket.socket(http_util.socket.AF_INET, http_util.socket.SOCK_STREAM) as bound:
        bound.bind(("127.0.0.1", 0))
        assert bound.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    with socket.socket() as untouched:
        untouched.bind(("127.0.0.1", 0))
        assert not untouched.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
