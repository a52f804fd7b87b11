"""Engine directories: models prepared for loading, divided among the ranks of one tensor-parallel size, in one dtype.

`save_engine_dir` makes one from a checkpoint. `load_engine` recognizes one by its manifest; each rank reads only its
own file, in the order that its kernels use, and converts nothing. All that is read is checked against the manifest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.kernels.operations import choose_operations
from tensorweave.workers.engine_dir.manifest import EngineManifest, rank_file, record_files
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.engine_dir.rank_file import RankFile, RankRecorder
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.gang.device import pick_device, pick_dtype
from tensorweave.workers.models.assembly import build_transformer, check_mesh, count_weights, tensor_shapes
from tensorweave.workers.models.checkpoint import SafetensorsDirectory, WeightSource, check_tensors, refuse_adapters
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.device_loader import DeviceLoader
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.gguf.file import INDEX_NAME, GgufFile
from tensorweave.workers.models.gguf.loader import GgufLoader
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.nested_tensors import NestedTensors
from tensorweave.workers.models.quantized.loader import QuantizedLoader
from tensorweave.workers.models.quantizing import quantizing
from tensorweave.workers.models.rank_weights import RankWeights
from tensorweave.workers.models.redundant_tensors import check_redundant_tensors, redundant_tensors
from tensorweave.workers.models.stacked_experts import StackedExperts
from tensorweave.workers.store.disk import writing_into

_COPIED: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_LEFT: Final = frozenset({"model.safetensors.index.json", "conversion.json", INDEX_NAME})


def save_engine_dir(
    source: Path,
    out: Path,
    *,
    tensor_parallel_size: int,
    dtype: str,
    quantization: str | None = None,
    moe_expert_parallel_size: int = 1,
) -> None:
    """Make the engine directory `out` from the model directory `source`, one rank after the other, which needs the
    memory of one rank's share.

    `out` appears complete or not at all. If `source` is an engine directory itself, it is copied if it fits.

    Args:
        tensor_parallel_size: the only size with which it can be loaded.
        dtype: the only type in which it can be loaded; 'auto' is the type in which this machine would load `source`.
        quantization: as `weight_quantization` names it: weights are saved quantized, and are loaded so.
        moe_expert_parallel_size: groups of ranks that have different experts, the only number of them with which it can
            be loaded; it divides tensor_parallel_size.

    Raises:
        ValueError: `out` exists and is not empty, or `source` cannot be loaded with these arguments.
    """
    if tensor_parallel_size < 1:
        raise ValueError(f"tensor_parallel_size is {tensor_parallel_size}, must be at least 1")
    if moe_expert_parallel_size < 1 or tensor_parallel_size % moe_expert_parallel_size:
        raise ValueError(
            f"moe_expert_parallel_size is {moe_expert_parallel_size}, must divide tensor_parallel_size "
            f"({tensor_parallel_size})"
        )
    mesh = Mesh(tensor=tensor_parallel_size, expert=moe_expert_parallel_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a new or an empty directory")
    manifest = EngineManifest.read(source)
    with _published(out) as made:
        if manifest is None:
            _convert(source, made, mesh, dtype, quantization)
        else:
            check_fit(manifest, source, mesh, dtype, quantization)
            _copy(manifest, source, made)


def check_engine_dir(
    directory: Path, place: MeshRank, dtype: str, quantization: str | None = None
) -> EngineManifest | None:
    """Return the manifest, or None if `directory` is not an engine directory.

    Raises:
        ValueError: it was saved for another size or dtype or without the quantization that is asked for, or a file that
            this rank reads is damaged.
    """
    manifest = EngineManifest.read(directory)
    if manifest is not None:
        check_fit(manifest, directory, place.mesh, dtype, quantization)
        manifest.check_files(directory, manifest.names_for(place.rank))
    return manifest


def check_fit(manifest: EngineManifest, directory: Path, mesh: Mesh, dtype: str, quantization: str | None) -> None:
    """Raises ValueError if the directory was saved for other sizes or another dtype, or without this quantization. With
    None, its own is taken."""
    if mesh.pipeline > 1:
        raise ValueError(
            f"pipeline_parallel_size is {mesh.pipeline}, and engine directory {directory} was saved for ranks that "
            f"have all layers; take the checkpoint"
        )
    for name, saved, asked in (
        ("tensor_parallel_size", manifest.tensor_parallel_size, mesh.tensor),
        ("moe_expert_parallel_size", manifest.moe_expert_parallel_size, mesh.expert),
    ):
        if saved != asked:
            raise ValueError(
                f"engine directory {directory} was saved for {name} {saved}, asked for {asked}; save it again from the "
                f"checkpoint"
            )
    if dtype not in ("auto", manifest.dtype):
        raise ValueError(
            f"engine directory {directory} was saved in {manifest.dtype}, asked for {dtype}; "
            f"save it again from the checkpoint"
        )
    if quantization not in (None, manifest.quantization):
        raise ValueError(
            f"engine directory {directory} was saved without the quantization that quant_config asks for "
            f"({quantization}); save it again from the checkpoint"
        )


@contextlib.contextmanager
def open_weights(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    place: MeshRank,
    num_threads: int = 1,
    on_progress: Callable[[float], object] = lambda share: None,
) -> Iterator[RankWeights]:
    """Open the weights of one rank: its own file of an engine directory, or its part of a checkpoint. `on_progress` is
    told the share of them that has been read, where that is known."""
    if EngineManifest.read(path) is not None:
        with RankFile(rank_file(path, place.rank), dtype, device, num_threads) as file:
            yield file
            file.check_all_read()
        return
    refuse_adapters(path)
    if (path / INDEX_NAME).is_file():
        blocks = GgufFile(path)
        _check(blocks, config)
        yield GgufLoader(blocks, dtype)
        return
    with SafetensorsDirectory(path, is_quantized=config.quantization is not None) as files:
        placed = NestedTensors(files, config.nested_names) if config.nested_names else files
        source = StackedExperts(placed) if config.has_stacked_experts else placed
        if config.quantization is not None:
            config.quantization.check(source, tensor_shapes(config), ignored=redundant_tensors(config))
            check_redundant_tensors(source, config)
            yield QuantizedLoader(source, config.quantization, WeightLoader(source, dtype, device))
            return
        _check(source, config)
        if device.type != "cuda":
            yield WeightLoader(source, dtype, device)
            return
        requests = count_weights(config, place).requests
        with DeviceLoader(placed.places(), requests, dtype, device, num_threads, on_progress=on_progress) as loader:
            yield loader


def _check(source: WeightSource, config: ModelConfig) -> None:
    check_tensors(source, tensor_shapes(config), ignored=redundant_tensors(config))
    check_redundant_tensors(source, config)


def _copy(manifest: EngineManifest, source: Path, made: Path) -> None:
    for name in manifest.files:
        shutil.copyfile(source / name, made / name)
    manifest.write(made)
    manifest.check_files(made, manifest.files)
    for rank in range(manifest.tensor_parallel_size):
        with RankFile(rank_file(made, rank), torch.float32, torch.device("cpu")) as file:
            file.check()


def _convert(source: Path, made: Path, mesh: Mesh, wanted: str, quantization: str | None) -> None:
    config = load_model_config(source)
    dtype = pick_dtype(wanted, config.checkpoint_dtype, pick_device("auto"))
    operations = choose_operations(torch.device("cpu"), dtype, config.sizes.head_dim)
    for place in mesh.ranks():
        check_mesh(config, place)
        with open_weights(source, config, dtype, torch.device("cpu"), place) as weights:
            recorder = RankRecorder(quantizing(weights, quantization))
            build_transformer(config, place, recorder, SoloComm(), operations)  # which is never run
            recorder.save(rank_file(made, place.rank))
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in _LEFT:
                shutil.copyfile(file, made / file.name)
    EngineManifest(
        tensorweave_version=sys.modules["tensorweave"].__version__,
        tensor_parallel_size=mesh.tensor,
        dtype=str(dtype).removeprefix("torch."),
        model_digest=model_digest(source),
        files=record_files(made),
        quantization=quantization,
        moe_expert_parallel_size=mesh.expert,
    ).write(made)


@contextlib.contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside `out`, and rename it to `out` at the end, or remove it after an error."""
    out = out.absolute()
    with writing_into(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}."
    with writing_into(out.parent), tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        yield made
        try:
            os.replace(made, out)
        except OSError as error:
            raise ValueError(f"{out} cannot be written: {error.strerror}") from None
