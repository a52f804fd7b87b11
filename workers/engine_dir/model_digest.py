"""A digest by which two hosts find out whether they have the same model, cheap to compute however large the weights.

It is computed where a service starts and again by every rank on its own host before it loads, and gangs that exchange
KV must have the same one. No torch here: drivers compute it too.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Final

MANIFEST_NAME: Final = "engine_manifest.json"
_NUM_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4 << 10


def model_digest(path: Path, load_format: str = "auto") -> str:
    """Digest the configuration in a model directory, and the sizes and samples of its weight files.

    A few hundred KiB are read, however large the model. An engine directory has the digest of the checkpoint from which
    it was made: in one dtype, their weights are the same.

    Raises:
        ValueError: a file cannot be read.
    """
    if load_format != "dummy" and (manifest := path / MANIFEST_NAME).is_file():
        return _read_saved(manifest)
    digest = blake2b(load_format.encode(), digest_size=16)
    try:
        digest.update((path / "config.json").read_bytes())
        weights = (*path.glob("*.safetensors"), *path.glob("*.gguf")) if load_format != "dummy" else ()
        for file in sorted(weights):
            digest.update(_sample(file))
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def check_model_digest(path: Path, load_format: str, expected: str) -> None:
    """Raises ValueError if the model in the directory is not the one with the digest `expected`."""
    found = model_digest(path, load_format)
    if found != expected:
        raise ValueError(
            f"the model in {path} differs from the one where the service was started (digests {found[:12]} and "
            f"{expected[:12]}): every host must have the same files"
        )


def _sample(file: Path) -> bytes:
    size = file.stat().st_size
    parts = [f"\n{file.name} {size}\n".encode()]
    with file.open("rb") as weights:
        for i in range(_NUM_SAMPLES):
            weights.seek(i * max(0, size - _SAMPLE_BYTES) // max(1, _NUM_SAMPLES - 1))
            parts.append(weights.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _read_saved(manifest: Path) -> str:
    """Read the manifest's `model_digest`. Whoever loads the directory checks the manifest itself."""
    try:
        saved = json.loads(manifest.read_bytes())["model_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is damaged: {type(error).__name__}: {error}") from None
    return str(saved)
