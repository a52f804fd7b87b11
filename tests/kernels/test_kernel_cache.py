"""Where compiled kernels are kept, and that nobody else can put some there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tensorweave.kernels.kernel_cache import cached_binary, ensure_kernel_cache


def test_a_binary_is_compiled_once_for_its_source_and_compiler(tmp_path: Path) -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"binary %d" % len(made))
        return made[-1]

    assert [cached_binary(tmp_path, b"source", "nvrtc 13.0", make) for _ in range(3)] == [b"binary 0"] * 3
    assert cached_binary(tmp_path, b"other source", "nvrtc 13.0", make) == b"binary 1"
    assert cached_binary(tmp_path, b"source", "nvrtc 13.1", make) == b"binary 2"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_source_that_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("expected a ;")

    with pytest.raises(RuntimeError, match="expected a ;"):
        cached_binary(tmp_path, b"source", "nvrtc", fail)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's directory, which cannot be made yet: there is a file in its place."""
    triton = pytest.importorskip("triton")
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "file"


@pytest.mark.gpu
def test_a_cache_that_cannot_be_written_is_replaced_by_one_of_this_user(
    tmp_path: Path, wanted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = ensure_kernel_cache()
    assert made == tmp_path / f"tensorweave-kernels-{os.getuid()}"
    assert made.stat().st_mode & 0o777 == 0o700
    assert "set TRITON_CACHE_DIR" in caplog.text
    caplog.clear()
    assert ensure_kernel_cache() == made
    assert not caplog.text


@pytest.mark.gpu
def test_a_cache_that_can_be_written_is_used(wanted: Path) -> None:
    wanted.unlink()
    assert ensure_kernel_cache() == wanted / "cache"


@pytest.mark.gpu
def test_a_directory_that_others_can_write_is_not_used(tmp_path: Path, wanted: Path) -> None:
    planted = tmp_path / f"tensorweave-kernels-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    made = ensure_kernel_cache()
    assert made != planted
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o777 == 0o700
