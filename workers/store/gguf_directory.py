"""`gguf_directory`: the directory through which a GGUF file is served: configuration and tokenizer as Hugging Face
states them, a link to the file, and an index of its tensors.

It is made once for a file, in the cache directory, in about 10 s for a vocabulary of 150,000 tokens. The weights stay
in the file; `models.gguf` reads them through the index.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from tensorweave.workers.store.disk import writing_into

INDEX_NAME: Final = "gguf_index.json"
LINK_NAME: Final = "model.gguf"
GGUF_SUFFIX: Final = ".gguf"
_VERSION: Final = 1  # raise it when other files are written than before
_NUM_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 16 << 10


def is_gguf(path: Path) -> bool:
    return path.suffix == GGUF_SUFFIX and path.is_file()


def gguf_directory(file: Path, cache_dir: Path, progress: Callable[[str], object]) -> Path:
    """Return the directory of `file`, after making it if it is not there.

    Raises:
        ValueError: it is no GGUF file, or of a model or a tokenizer that is not served.
    """
    file = file.resolve()
    target = cache_dir / f"gguf-{_digest(file)}"
    if (target / INDEX_NAME).is_file():
        return target
    progress(f"{file.name}: writing its configuration and tokenizer to {target}")
    with writing_into(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=cache_dir) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _write(file, made)
            try:
                os.rename(made, target)
            except OSError:
                if not (target / INDEX_NAME).is_file():  # else another process was faster
                    raise
    return target


def _write(file: Path, target: Path) -> None:
    from tensorweave.workers.store.gguf_families import ROPE_FACTORS, end_ids, find_family, hf_config  # imports numpy
    from tensorweave.workers.store.gguf_header import GgufHeader
    from tensorweave.workers.store.gguf_tokenizer import write_tokenizer

    header = GgufHeader.read(file)
    family = find_family(header)
    tensors: dict[str, Any] = {}
    for name, tensor in header.tensors.items():
        if tensor.offset + tensor.num_bytes > file.stat().st_size:
            raise ValueError(f"{file} ends within the tensor {name}")
        if name == ROPE_FACTORS:
            continue
        hf_name = family.hf_name(name)
        if hf_name is None:
            raise ValueError(
                f"{file.name}: the tensor {name} is not known of general.architecture {header.architecture}"
            )
        tensors[hf_name] = {
            "kind": tensor.kind,
            "shape": tensor.shape,
            "offset": tensor.offset,
            "bytes": tensor.num_bytes,
        }
    kinds = {entry["kind"] for entry in tensors.values() if len(entry["shape"]) > 1}
    config = hf_config(header, _read_factors(header, file), _dtype(kinds))
    if family.has_neighbours:
        _mark_neighbours(tensors, config)
    bits = {name: 8 * entry["bytes"] // (entry["shape"][0] * entry["shape"][1]) for name, entry in _matrices(tensors)}
    config["quantization_config"] = {"quant_method": "gguf", "bits": min(bits.values())}
    _write_json(target / "config.json", config)
    ends = end_ids(header)
    _write_json(target / "generation_config.json", {"eos_token_id": ends} if ends else {})
    write_tokenizer(header, file, target)
    (target / LINK_NAME).symlink_to(file)
    _write_json(target / INDEX_NAME, {"file_bytes": file.stat().st_size, "tensors": tensors})


def _matrices(tensors: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, entry) for name, entry in tensors.items() if len(entry["shape"]) == 2]


def _mark_neighbours(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Heads in whose rows neighbours are rotated together: a matrix of q or k has that many."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, entry in tensors.items():
        if (part := name.split(".")[-2]) in heads:
            entry["neighbours_in_heads"] = heads[part]


def _dtype(kinds: set[str]) -> str:
    """The type that loses nothing of matrices that are not quantized; bfloat16 beside quantized ones."""
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _read_factors(header: Any, file: Path) -> Any:
    import numpy as np

    from tensorweave.workers.store.gguf_families import ROPE_FACTORS

    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.kind != "F32":
        raise ValueError(f"{header.source}: the tensor {ROPE_FACTORS} is {tensor.kind}; supported: F32")
    return np.fromfile(file, dtype=np.float32, count=tensor.shape[-1], offset=tensor.offset)


def _digest(file: Path) -> str:
    """A digest of its path, its size and samples of its bytes, the first megabyte among them."""
    size = file.stat().st_size
    digest = blake2b(f"{_VERSION} {file} {size}".encode(), digest_size=10)
    with file.open("rb") as stored:
        digest.update(stored.read(1 << 20))
        for i in range(_NUM_SAMPLES):
            stored.seek(i * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            digest.update(stored.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
