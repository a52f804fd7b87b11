"""A checkpoint read in parallel, in pieces and ahead, gives what the plain loader gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.models.assembly import count_weights
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.device_loader import DeviceLoader
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.rank_weights import RankWeights, TensorRows, WeightRequest
from tensorweave.workers.models.staging import Piece, PinnedStaging
from tests.workers.tiny_models import make_model
from tests.workers.waiting import WAIT_S

CPU = torch.device("cpu")


class PlainStaging:
    """On a CPU. Each piece waits for `gate`."""

    gate: threading.Event | None = None

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8)

    def load(self, piece: Piece, ready: Any) -> None:
        assert self.gate is None or self.gate.wait(WAIT_S)
        piece.file.read_into(self.bytes[: piece.num_bytes].numpy().data, piece.offset)
        piece.put(self.bytes[: piece.num_bytes])

    def await_copies(self) -> None:
        pass


def ask(weights: RankWeights, request: WeightRequest) -> torch.Tensor:
    """As a model would have asked for it."""
    (first, *others), columns = request.parts, request.columns
    if len(first.shape) == 1 and not others and len(first.rows) == first.shape[0]:
        return weights.vector(first.name, first.shape[0])
    if others or columns is None:
        return weights.rows(request.parts)
    matrix = weights.matrix_columns(first.name, (first.shape[0], first.shape[1]), columns)
    assert isinstance(matrix, torch.Tensor)
    return matrix


@contextmanager
def loading(
    path: Path, config: ModelConfig, place: MeshRank, dtype: torch.dtype, device: torch.device = CPU, **knobs: Any
) -> Iterator[DeviceLoader]:
    make: Any = PlainStaging if device == CPU else PinnedStaging
    requests = count_weights(config, place).requests
    with (
        SafetensorsDirectory(path) as source,
        DeviceLoader(source.places(), requests, dtype, device, 3, **{"make_staging": make, **knobs}) as loader,
    ):
        yield loader


def assert_equal_weights(path: Path, size: int, dtype: torch.dtype, device: torch.device, **knobs: Any) -> None:
    config = load_model_config(path)
    for place in Mesh(tensor=size).ranks():
        requests = count_weights(config, place).requests
        with (
            SafetensorsDirectory(path) as source,
            loading(path, config, place, dtype, device, **knobs) as loader,
        ):
            plain = WeightLoader(source, dtype, CPU)
            for request in requests:
                loaded = ask(loader, request)
                assert loaded.device == device
                assert torch.equal(loaded.cpu(), ask(plain, request)), request


@pytest.mark.parametrize("model", ["llama", "llama_tied_9_over_3", "llama_biases", "qwen3"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_gets_the_weights_of_the_plain_loader(tmp_path: Path, model: str, size: int) -> None:
    make_model(model, tmp_path).save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors").unlink()
    assert_equal_weights(tmp_path, size, torch.float32, CPU, piece_bytes=1000, ahead_bytes=20_000)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_converted_as_the_plain_loader_does(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    make_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    with SafetensorsDirectory(tmp_path) as source:
        tensors = {name: source.read(name).to(stored) for name in source.shapes}
    save_file(tensors, file)
    assert_equal_weights(tmp_path, 2, dtype, CPU, piece_bytes=777)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [1000, 8 << 20])
def test_a_gpu_gets_the_weights_of_the_plain_loader(
    tmp_path: Path, size: int, dtype: torch.dtype, piece_bytes: int
) -> None:
    make_model("llama_biases", tmp_path)
    device = torch.device("cuda", torch.cuda.current_device())
    assert_equal_weights(tmp_path, size, dtype, device, piece_bytes=piece_bytes)


def test_another_order_and_repeated_requests_only_take_longer(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = load_model_config(tmp_path)
    requests = count_weights(config, MeshRank()).requests
    with (
        SafetensorsDirectory(tmp_path) as source,
        loading(tmp_path, config, MeshRank(), torch.float32, ahead_bytes=30_000) as loader,
    ):
        plain = WeightLoader(source, torch.float32, CPU)
        for request in [requests[-1], requests[0], requests[0], *reversed(requests)]:
            assert torch.equal(ask(loader, request), ask(plain, request))


def test_progress_is_told_and_ends_at_one(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = load_model_config(tmp_path)
    told: list[float] = []
    with loading(tmp_path, config, MeshRank(), torch.bfloat16, on_progress=told.append) as loader:
        for request in count_weights(config, MeshRank()).requests:
            ask(loader, request)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_no_more_is_read_ahead_than_is_allowed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10, 10), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    requests = [WeightRequest((TensorRows(name, (10, 10), range(10)),)) for name in tensors]
    begun: list[int] = []

    class Noting(PlainStaging):
        def load(self, piece: Piece, ready: Any) -> None:
            begun.append(piece.offset)
            super().load(piece, ready)

    with (
        SafetensorsDirectory(tmp_path) as source,
        DeviceLoader(source.places(), requests, torch.float32, CPU, 1, make_staging=Noting, ahead_bytes=800) as loader,
    ):
        for i, request in enumerate(requests):
            assert torch.equal(loader.rows(request.parts), tensors[f"t{i}"])
            assert len(begun) <= i + 2
    assert len(begun) == 8


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = load_model_config(tmp_path)
    file = tmp_path / "model.safetensors"
    with SafetensorsDirectory(tmp_path) as source:
        places = source.places()
    with file.open("r+b") as stored:
        stored.truncate(file.stat().st_size - 5000)
    requests = count_weights(config, MeshRank()).requests

    def load() -> None:
        with DeviceLoader(places, requests, torch.float32, CPU, 2, make_staging=PlainStaging) as loader:
            for request in requests:
                ask(loader, request)

    with pytest.raises(ValueError, match=r"model\.safetensors ends at byte \d+, within a tensor"):
        load()


def test_leaving_early_ends_the_threads(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = load_model_config(tmp_path)
    gate = threading.Event()

    class Gated(PlainStaging):
        pass

    Gated.gate = gate
    with loading(tmp_path, config, MeshRank(), torch.float32, make_staging=Gated) as loader:
        loader._read_ahead()
        readers = list(loader._pool._threads)
        gate.set()
    assert readers
    assert not any(reader.is_alive() for reader in readers)
