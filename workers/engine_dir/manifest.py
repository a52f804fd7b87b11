"""`EngineManifest`: for what an engine directory was saved, and the digests that its files must have.

It is read and checked before any other file of the directory. Every problem is a ValueError that names the file and
what is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Self

from tensorweave.cluster.quant_config import IntegerWeights
from tensorweave.workers.engine_dir.digest import digest_file, digest_header
from tensorweave.workers.engine_dir.model_digest import MANIFEST_NAME

FORMAT_VERSION: Final = 1
"""Raise it when the layout of rank files changes."""
_DIGEST_BYTES: Final = 16
_CHECKED_SUFFIXES: Final = (".json", ".safetensors")
_DTYPES: Final = ("float32", "bfloat16", "float16")
_KEYS: Final = frozenset(
    {"format_version", "tensorweave_version", "tensor_parallel_size", "dtype", "model_digest", "files", "digest"}
)
_OPTIONAL_KEYS: Final = frozenset({"quantization", "moe_expert_parallel_size"})


@dataclass(frozen=True, slots=True)
class FileRecord:
    """`digest` is that of the whole file; for a rank's file that of its header, which has its tensors' digests."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """`model_digest` is that of the source checkpoint: gangs that exchange KV compare it. `quantization` is that of the
    weights, as in `TorchLlmArgs`, and so is `moe_expert_parallel_size`; a directory without them is read by versions
    that do not know them."""

    tensorweave_version: str
    tensor_parallel_size: int
    dtype: str
    model_digest: str
    files: Mapping[str, FileRecord]
    quantization: str | None = None
    moe_expert_parallel_size: int = 1

    def write(self, directory: Path) -> None:
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.quantization is None:
            del fields["quantization"]
        if self.moe_expert_parallel_size == 1:
            del fields["moe_expert_parallel_size"]
        text = json.dumps({**fields, "digest": _digest_fields(fields)}, indent=2)
        (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Return None if `directory` is not an engine directory.

        Raises:
            ValueError: the manifest is damaged, or of another format version.
        """
        file = directory / MANIFEST_NAME
        if not file.is_file():
            if rank_file(directory, 0).is_file():
                raise ValueError(f"{directory} has files of an engine directory, but no {MANIFEST_NAME}")
            return None
        try:
            fields = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: it is not JSON ({error})") from None
        return cls(**_checked(fields, str(file)))

    def check_files(self, directory: Path, names: Collection[str]) -> None:
        """Check that all files are there with their sizes, and that the bytes of those in `names` are unchanged.

        Of rank files only the header is read; `RankFile` checks each tensor when it reads it. Configuration and weight
        files that were added later are refused: they would be used, or ignored, unchecked.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        listed = {*self.files, MANIFEST_NAME}
        later = sorted(f.name for f in directory.iterdir() if f.suffix in _CHECKED_SUFFIXES and f.name not in listed)
        if later:
            raise ValueError(f"engine directory {directory}: {', '.join(later)} came after saving; save it again")
        for name, record in self.files.items():
            file = directory / name
            if not file.is_file():
                raise ValueError(f"engine directory {directory}: {name} is missing")
            if (size := file.stat().st_size) != record.size:
                raise ValueError(f"engine directory {directory}: {name} has {size} bytes, was saved with {record.size}")
        for name in names:
            if _digest(directory / name) != self.files[name].digest:
                raise ValueError(
                    f"engine directory {directory}: {name} is damaged, its bytes have changed since saving"
                )

    def names_for(self, rank: int) -> list[str]:
        """The files that this rank reads: its own weights, and those that are not weights."""
        others = {rank_name(other) for other in range(self.tensor_parallel_size) if other != rank}
        return [name for name in self.files if name not in others]


def saved_quantization(directory: Path, load_format: str) -> str | None:
    """How an engine directory's weights were quantized when it was saved. None: they were not, `directory` is none, or
    `load_format` reads no weights."""
    manifest = None if load_format == "dummy" else EngineManifest.read(directory)
    return None if manifest is None else manifest.quantization


def rank_name(rank: int) -> str:
    return f"rank{rank}.safetensors"


def rank_file(directory: Path, rank: int) -> Path:
    return directory / rank_name(rank)


def record_files(directory: Path) -> dict[str, FileRecord]:
    return {
        file.name: FileRecord(file.stat().st_size, _digest(file))
        for file in sorted(directory.iterdir())
        if file.name != MANIFEST_NAME
    }


def _digest(file: Path) -> str:
    return digest_header(file) if file.name.startswith("rank") else digest_file(file)


def _digest_fields(fields: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _checked(fields: Any, source: str) -> dict[str, Any]:
    """The arguments of `EngineManifest`. Raises ValueError."""
    if not isinstance(fields, dict):
        raise ValueError(f"{source} is damaged: it holds a {type(fields).__name__}, must be an object")
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{source} has format_version {version!r}; this version of tensorweave reads {FORMAT_VERSION}")
    if unknown := sorted(set(fields) - _KEYS - _OPTIONAL_KEYS):
        raise ValueError(f"{source} has unknown keys: {', '.join(unknown)}")
    if absent := sorted(_KEYS - set(fields)):
        raise ValueError(f"{source} lacks keys: {', '.join(absent)}")
    body = {key: value for key, value in fields.items() if key != "digest"}
    if fields["digest"] != _digest_fields(body):
        raise ValueError(f"{source} is damaged: its fields have changed since saving")
    size, dtype, files = body["tensor_parallel_size"], body["dtype"], body["files"]
    if type(size) is not int or size < 1 or dtype not in _DTYPES or not isinstance(files, dict):
        raise ValueError(f"{source} is damaged: tensor_parallel_size {size!r}, dtype {dtype!r}")
    expert = body.get("moe_expert_parallel_size", 1)
    if type(expert) is not int or expert < 1 or size % expert:
        raise ValueError(f"{source} is damaged: moe_expert_parallel_size {expert!r} of {size} ranks")
    if not _is_known(body.get("quantization")):
        raise ValueError(f"{source} has quantization {body['quantization']!r}, which this version does not read")
    return {
        **{key: value for key, value in body.items() if key not in ("format_version", "files")},
        "files": {_plain(name, source): _record(name, record, source) for name, record in files.items()},
    }


def _is_known(quantization: Any) -> bool:
    if not isinstance(quantization, str):
        return quantization is None
    return quantization == "fp8" or IntegerWeights.parse(quantization) is not None


def _plain(name: str, source: str) -> str:
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"{source} lists {name!r}, which is not a file of its directory")
    return name


def _record(name: str, record: Any, source: str) -> FileRecord:
    match record:
        case {"size": int(size), "digest": str(digest)} if len(record) == 2:
            return FileRecord(size, digest)
    raise ValueError(f"{source} says of {name} {record!r}, must be a size and a digest")
