"""Reading weights: slices of one or many safetensors files, refusals by name, and the memory a rank needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tensorweave.workers.build import check_model
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.checkpoint import RandomWeights, SafetensorsDirectory, check_tensors
from tests.workers.engine_drive import engine_args, generate_on_ranks, random_prompts
from tests.workers.tiny_models import make_model, their_greedy


def write_sharded(path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.arange(12.0).view(3, 4) + 100 * i for i in range(4)}
    save_file({name: tensors[name] for name in ("t0", "t1")}, path / "a.safetensors")
    save_file({name: tensors[name] for name in ("t2", "t3")}, path / "b.safetensors")
    files = {"t0": "a.safetensors", "t1": "a.safetensors", "t2": "b.safetensors", "t3": "b.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tensors


def test_slices_of_sharded_files(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    with SafetensorsDirectory(tmp_path) as source:
        assert source.shapes == dict.fromkeys(tensors, (3, 4))
        assert torch.equal(source.read("t3"), tensors["t3"])
        assert torch.equal(source.read("t2", slice(1, 3)), tensors["t2"][1:3])
        assert torch.equal(source.read("t1", slice(0, 3), slice(1, 3)), tensors["t1"][:, 1:3])


def test_a_sharded_model_gives_the_same_tokens(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path)
    prompts = random_prompts(3, 40)
    expected = their_greedy(model, prompts, 6)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert generate_on_ranks(tmp_path, 2, prompts, 6) == expected


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        SafetensorsDirectory(tmp_path)
    write_sharded(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lists files that are not there: b\.safetensors"):
        SafetensorsDirectory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no usable weight_map"):
        SafetensorsDirectory(tmp_path)


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(ValueError, match="holds a broken safetensors file"):
        SafetensorsDirectory(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    source = RandomWeights({"a": (2, 3), "b": (4,), "x.rotary_emb.inv_freq": (2,)})
    ignored = ("rotary_emb.inv_freq",)
    check_tensors(source, {"a": (2, 3), "b": (4,)}, ignored)
    with pytest.raises(ValueError, match=r"the checkpoint lacks tensors: c, d$"):
        check_tensors(source, {"a": (2, 3), "b": (4,), "c": (1,), "d": (1,)}, ignored)
    with pytest.raises(ValueError, match=r"has tensors that this model does not use: b$"):
        check_tensors(source, {"a": (2, 3)}, ignored)
    with pytest.raises(ValueError, match=r"another shape: a \[2, 3\] \(expected \[3, 2\]\)$"):
        check_tensors(source, {"a": (3, 2), "b": (4,)}, ignored)
    with pytest.raises(ValueError, match=r"lacks tensors: t0, t1, .*, t7 and 12 more$"):
        check_tensors(source, {f"t{i}": (1,) for i in range(20)})


def test_a_model_with_a_tensor_too_few_is_refused(tmp_path: Path) -> None:
    make_model("qwen2", tmp_path)
    with SafetensorsDirectory(tmp_path) as source:
        tensors = {name: source.read(name).clone() for name in source.shapes}
    gone = "model.layers.1.self_attn.k_proj.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks tensors: {gone}"):
        load_engine(engine_args(tmp_path), SoloComm())


def test_a_tensor_that_two_files_have_is_refused(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    save_file({"t1": tensors["t1"] + 1, "t2": tensors["t2"], "t3": tensors["t3"]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"tensor t1 is in a\.safetensors and in b\.safetensors"):
        SafetensorsDirectory(tmp_path)


def test_an_index_that_is_not_true_is_refused(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    save_file({"t2": tensors["t2"]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"lists tensors that are not in the file it names: t3"):
        SafetensorsDirectory(tmp_path)
    write_sharded(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has model\.safetensors and an index of other files"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_numbers_that_need_scales_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 3).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"no plain numbers, and config\.json has no quantization_config .*: b (F8_E4M3|I8)",
    ):
        SafetensorsDirectory(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for backend in ("pytorch", "_autodeploy"):
        with pytest.raises(ValueError, match=r"has adapter_config\.json: adapters are not applied here"):
            check_model(engine_args(tmp_path, backend=backend))
    with pytest.raises(ValueError, match=r"has adapter_config\.json"):
        load_engine(engine_args(tmp_path), SoloComm())


def test_random_weights_depend_on_the_name_alone() -> None:
    small, large = RandomWeights({"a.weight": (4, 6)}), RandomWeights({"b.weight": (2, 2), "a.weight": (4, 6)})
    assert torch.equal(small.read("a.weight", slice(1, 3)), large.read("a.weight")[1:3])
    assert not torch.equal(large.read("a.weight")[:2, :2], large.read("b.weight"))
    assert torch.equal(RandomWeights({"x_norm.weight": (3,)}).read("x_norm.weight"), torch.ones(3))


_LOAD_AND_MEASURE = """
import resource, sys, torch
from pathlib import Path
from tensorweave.kernels.operations import choose_operations
from tensorweave.workers.build import check_model
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.assembly import build_transformer
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader

def anonymous_kib():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])

class Watched:
    def __init__(self, source):
        self.source, self.shapes, self.peak_kib = source, source.shapes, 0
    def read(self, name, *index):
        part = self.source.read(name, *index)
        self.peak_kib = max(self.peak_kib, anonymous_kib())
        return part

path = sys.argv[1]
config = load_model_config(path)
torch.set_num_threads(1)
with SafetensorsDirectory(path) as files:
    source = Watched(files)
    before = anonymous_kib()
    loader = WeightLoader(source, torch.float32, torch.device("cpu"))
    operations = choose_operations(torch.device("cpu"), torch.float32, config.sizes.head_dim)
    model = build_transformer(config, MeshRank(1, Mesh(tensor=4)), loader, SoloComm(), operations)
print(source.peak_kib - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_rank_needs_its_share_of_memory_and_one_tensor(tmp_path: Path) -> None:
    make_model(
        "llama",
        tmp_path,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=32768,
    )
    command = [sys.executable, "-c", _LOAD_AND_MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    whole_kib = (tmp_path / "model.safetensors").stat().st_size / 1024
    largest_kib = 32768 * 512 * 4 / 1024
    assert int(done.stdout) < whole_kib / 4 + largest_kib / 4 + 8192
