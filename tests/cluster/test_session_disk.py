"""A full disk is named before Ray is started on it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tensorweave.cluster import session_disk
from tensorweave.cluster.session_disk import why_no_room


def test_a_full_disk_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=65536)

    monkeypatch.setattr(session_disk, "shutil", SimpleNamespace(disk_usage=usage))
    why = why_no_room(folder)
    assert why is not None
    assert f"No space left on device: 0.1 MB are free in '{folder}'" in why
    assert asked == [tmp_path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_disk.os, "access", lambda path, mode: False)
    assert f"nothing can be written to '{tmp_path}'" in (why_no_room(tmp_path) or "")


def test_this_machine_has_room() -> None:
    assert why_no_room() is None
