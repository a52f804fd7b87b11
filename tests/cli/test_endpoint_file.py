"""The file that tells where a service answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorweave.cli.endpoint_file import endpoint_file


def test_the_file_is_there_while_the_service_answers(tmp_path: Path) -> None:
    path = tmp_path / "endpoint"
    path.write_text("of a run that was killed")
    with endpoint_file(path) as write:
        assert not path.exists()
        write("http://10.0.0.1:8000")
        assert path.read_text() == "http://10.0.0.1:8000\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"--endpoint-file: there is no folder '.*nowhere'"),
        endpoint_file(tmp_path / "nowhere" / "file"),
    ):
        pass
