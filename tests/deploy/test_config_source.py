"""A notice if the file of a deployed application changes, because Serve does not read it again."""

from __future__ import annotations

from pathlib import Path

from tensorweave.deploy.config_source import ConfigSource


def test_a_changed_file_is_told_with_the_remedy_and_a_missing_one_is_another_host_s(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("model: m\n", encoding="utf-8")
    source = ConfigSource.read(path)
    assert source.notice() is None
    path.write_text("model: n\n", encoding="utf-8")
    notice = source.notice()
    assert notice is not None
    assert notice.startswith(f"{path} has changed since this application was built")
    assert "revision" in notice
    path.unlink()
    assert source.notice() is None
