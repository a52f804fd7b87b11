"""A model that does not fit is refused before it is loaded, with what it needs and what there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tensorweave.cluster.host_memory import HostMemory
from tensorweave.cluster.mesh import Mesh
from tensorweave.kernels.operations import choose_operations
from tensorweave.kernels.weights import PackedWeight
from tensorweave.workers.autodeploy.loader import load_autodeploy
from tensorweave.workers.engine import memory_need
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine.memory_need import MemoryNeed, rank_weight_bytes
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.assembly import build_transformer
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.rank_weights import TensorRows
from tests.workers.engine_drive import engine_args
from tests.workers.tiny_models import make_model, rewrite_config

GIB = 1 << 30


class _Counting:
    """Passes on what a loader reads, and counts the bytes of matrices."""

    def __init__(self, loader: WeightLoader) -> None:
        self._loader = loader
        self.num_bytes = 0

    def vector(self, name: str, size: int) -> Tensor:
        return self._loader.vector(name, size)

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self._count(self._loader.rows(parts))

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Tensor | PackedWeight:
        return self._count(self._loader.matrix_rows(parts))

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Tensor | PackedWeight:
        return self._count(self._loader.matrix_columns(name, shape, columns))

    def tied_head(self, embedding_VD: Tensor) -> Tensor | PackedWeight:
        return self._loader.tied_head(embedding_VD)

    def _count(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("model", ["llama", "llama_tied_9_over_3", "llama_biases"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_weights_are_counted_as_they_will_be(tmp_path: Path, model: str, size: int) -> None:
    make_model(model, tmp_path)
    config = load_model_config(tmp_path)
    operations = choose_operations(torch.device("cpu"), torch.bfloat16, config.sizes.head_dim)
    with SafetensorsDirectory(tmp_path) as source:
        for place in Mesh(tensor=size).ranks():
            counting = _Counting(WeightLoader(source, torch.bfloat16, torch.device("cpu")))
            build_transformer(config, place, counting, SoloComm(), operations)
            assert rank_weight_bytes(config, place, torch.bfloat16) == counting.num_bytes


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    rewrite_config(tmp_path, lambda config: config.update(intermediate_size=1 << 40))
    with pytest.raises(ValueError, match=r"^not enough memory: the model needs at least .* GiB are free on this host"):
        load_engine(engine_args(tmp_path, load_format="dummy"), SoloComm())


def test_a_cgroups_limit_refuses_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama", tmp_path)
    monkeypatch.setattr(memory_need, "host_memory", lambda: HostMemory(10_000, "a cgroup's limit of 0.00 GiB, /box"))
    for load, knobs in ((load_engine, {}), (load_autodeploy, {"backend": "_autodeploy"})):
        with pytest.raises(ValueError, match=r"not enough memory: .* \(a cgroup's limit of 0\.00 GiB, /box\)"):
            load(engine_args(tmp_path, **knobs), SoloComm())


@pytest.mark.parametrize(
    ("need", "num_ranks", "told"),
    [
        (MemoryNeed(2 * GIB, GIB // 2), 1, None),
        (
            MemoryNeed(2 * GIB, GIB),
            1,
            "at least 3.00 GiB (weights 2.00 GiB, KV cache 1.00 GiB) a rank; 2.50 GiB",
        ),
        (
            MemoryNeed(GIB, GIB // 2),
            2,
            "a rank, 3.00 GiB for the 2 ranks here; 2.50 GiB are free on this host (a limit)",
        ),
        (
            MemoryNeed(GIB, GIB, kv_tokens=1024),
            2,
            "kv_cache_config.max_tokens is 1024, which takes 1.00 GiB beside weights of 1.00 GiB a rank, 4.00 GiB for "
            "the 2 ranks here; 2.50 GiB are free on this host (a limit), enough for 256 tokens",
        ),
        (MemoryNeed(3 * GIB, GIB, kv_tokens=1024), 1, "the model needs at least 4.00 GiB"),
    ],
)
def test_need_and_have_are_told(need: MemoryNeed, num_ranks: int, told: str | None) -> None:
    memory = HostMemory(5 * GIB // 2, "a limit")
    if told is None:
        need.check(memory, num_ranks, "on this host")
        return
    with pytest.raises(ValueError, match="not enough memory") as caught:
        need.check(memory, num_ranks, "on this host")
    assert told in str(caught.value)
