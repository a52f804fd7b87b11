"""What two gangs must have alike for a KV block of one to be right in the other: names and values, compared by name."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Final

from tensorweave.workers.engine_manifest import EngineManifest
from tensorweave.workers.transfer.window import PoolWindow

TRANSFER_VERSION: Final = 1
"""Raise it when digests, packing or the pool's layout change."""
_NUM_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4 << 10


def fingerprint(window: PoolWindow, model: str, num_heads: int) -> dict[str, str]:
    """`model` is a digest of the weights; `num_heads` are the model's KV heads, over all ranks."""
    return {
        "version": str(TRANSFER_VERSION),
        "model": model,
        "dtype": window.dtype_name,
        "tokens_per_block": str(window.tokens_per_block),
        "layout": f"{window.num_layers} layers, {num_heads} KV heads of {window.head_dim}",
    }


def model_digest(path: Path, load_format: str = "auto") -> str:
    """Of a model directory: its configuration, and the sizes and samples of its weight files.

    A few hundred KiB are read, however large the model. An engine directory has the digest of what it was made from:
    its weights are the same in the dtype that both must have alike anyway.
    """
    if load_format != "dummy" and (saved := EngineManifest.read(path)) is not None:
        return saved.model_digest
    digest = blake2b(load_format.encode(), digest_size=16)
    digest.update((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")) if load_format != "dummy" else ():
        size = file.stat().st_size
        digest.update(f"\n{file.name} {size}\n".encode())
        with file.open("rb") as weights:
            for i in range(_NUM_SAMPLES):
                weights.seek(i * max(0, size - _SAMPLE_BYTES) // max(1, _NUM_SAMPLES - 1))
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()
