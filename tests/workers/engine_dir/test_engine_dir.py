"""Engine directories: the tokens of the checkpoint at any size; everything that does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels import weights
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.weights import PackedWeight, native_layout, pack_weight
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine_dir.digest import digest_file, digest_tensor
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.engine_dir.manifest import MANIFEST_NAME, EngineManifest, rank_file, record_files
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.gang.device import pick_dtype
from tests.workers.engine_drive import engine_args, generate_on_ranks, random_prompts
from tests.workers.tiny_models import make_model, rewrite_config, their_greedy
from tests.workers.transfer_drive import model_gang, run_disaggregated

PROMPTS = [*random_prompts(3, 60), [7]]
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    make_model("llama", path)
    (path / "tokenizer_config.json").write_text("{}")
    (path / "LICENSE.txt").write_text("free")
    return path


@pytest.fixture(scope="module")
def saved_once(checkpoint: Path) -> Path:
    out = checkpoint.parent / "engine"
    save_engine_dir(checkpoint, out, tensor_parallel_size=2, dtype="float32")
    return out


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """For two ranks in float32; to be spoiled."""
    return Path(shutil.copytree(saved_once, tmp_path / "engine"))


class OneOf(SoloComm):
    """A rank without its peers."""

    def __init__(self, rank: int, size: int) -> None:
        self.place = MeshRank(rank, Mesh(tensor=size))
        self.rank, self.size = rank, size


def load(path: Path, size: int = 2, **knobs: Any) -> None:
    """Every rank in its turn."""
    for rank in range(size):
        load_engine(engine_args(path, **knobs), OneOf(rank, size))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("llama_tied_9_over_3", size) for size in (1, 2, 3, 4)),
        ("llama_biases", 3),
        ("llama_8_over_2", 3),
        ("qwen2", 2),
        ("qwen3", 1),
    ],
)
def test_the_same_tokens_as_from_the_checkpoint(name: str, size: int, tmp_path: Path) -> None:
    model = make_model(name, tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=size, dtype="float32")
    (tmp_path / "model" / "model.safetensors").unlink()
    expected = their_greedy(model, PROMPTS, NUM_TOKENS)
    assert generate_on_ranks(tmp_path / "engine", size, PROMPTS, NUM_TOKENS, dtype="auto") == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["llama_tied_9_over_3", "llama_biases"])
def test_a_gpu_reads_what_was_saved_for_a_cpu(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    expected = their_greedy(model, PROMPTS, NUM_TOKENS)
    found = generate_on_ranks(tmp_path / "engine", 1, PROMPTS, NUM_TOKENS, dtype="auto", device="cuda")
    assert found == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_gives_the_bits_of_the_checkpoint(dtype: str, tmp_path: Path) -> None:
    model = make_model("qwen2", tmp_path / "model").bfloat16()
    model.save_pretrained(tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=2, dtype=dtype)
    expected = generate_on_ranks(tmp_path / "model", 2, PROMPTS, NUM_TOKENS, dtype=dtype)
    assert generate_on_ranks(tmp_path / "engine", 2, PROMPTS, NUM_TOKENS, dtype="auto") == expected
    with safe_open(str(rank_file(tmp_path / "engine", 1)), framework="pt") as file:
        stored = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert stored == {torch.float16 if dtype == "float16" else torch.bfloat16}


def test_weights_packed_for_another_cpu_are_unpacked(
    checkpoint: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_on_ranks(checkpoint, 2, PROMPTS, NUM_TOKENS)
    monkeypatch.setattr(PackedWeight, "suits", lambda weight: False)
    assert generate_on_ranks(saved, 2, PROMPTS, NUM_TOKENS) == expected


def test_weights_saved_without_a_compiler_are_rows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(weights, "load_native", lambda dtype: None)
        save_engine_dir(checkpoint, tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    with safe_open(str(rank_file(tmp_path / "engine", 0)), framework="pt") as file:
        assert max(file.get_tensor(name).dim() for name in file.keys()) == 2  # noqa: SIM118
    expected = generate_on_ranks(checkpoint, 1, PROMPTS, NUM_TOKENS)
    assert generate_on_ranks(tmp_path / "engine", 1, PROMPTS, NUM_TOKENS) == expected


@pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_can_be_unpacked(dtype: torch.dtype) -> None:
    assert native_layout(dtype) is not None
    weight = torch.randn(70, 30).to(dtype)
    packed = pack_weight(weight)
    assert packed is not None
    assert packed.suits()
    assert torch.equal(packed.rows(), weight)


# ---- what a directory holds


def test_it_holds_all_that_a_model_needs(checkpoint: Path, saved: Path) -> None:
    files = {file.name for file in saved.iterdir()}
    assert files == {
        MANIFEST_NAME,
        "rank0.safetensors",
        "rank1.safetensors",
        *("config.json", "generation_config.json", "tokenizer_config.json", "LICENSE.txt"),
    }
    assert (saved / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    manifest = EngineManifest.read(saved)
    assert manifest is not None
    assert (manifest.tensor_parallel_size, manifest.dtype) == (2, "float32")
    assert set(manifest.files) == files - {MANIFEST_NAME}


def test_gangs_of_either_source_know_each_others_weights(checkpoint: Path, saved: Path) -> None:
    assert model_digest(saved) == model_digest(checkpoint)
    assert model_digest(saved, "dummy") == model_digest(checkpoint, "dummy")


def test_one_gang_prefills_from_the_checkpoint_and_another_decodes_from_an_engine_directory(
    checkpoint: Path, saved: Path
) -> None:
    samplings = [SamplingSpec(max_tokens=6)] * len(PROMPTS)
    with model_gang(checkpoint, 1, name="P") as prefill, model_gang(saved, 2, name="D") as decode:
        answers = [answer.tokens for answer in run_disaggregated(prefill, decode, PROMPTS, samplings)]
        assert decode.failures() == {}
        assert decode.gauge("kv_transfer_blocks_total") > 0
    assert answers == generate_on_ranks(checkpoint, 1, PROMPTS, 6)


def test_a_rank_reads_its_own_file_alone(saved: Path) -> None:
    (saved / "rank0.safetensors").write_bytes(b"\0" * (saved / "rank0.safetensors").stat().st_size)
    load_engine(engine_args(saved), OneOf(1, 2))
    with pytest.raises(ValueError, match=r"rank0\.safetensors is damaged"):
        load_engine(engine_args(saved), OneOf(0, 2))


def test_random_weights_need_no_rank_files(saved: Path) -> None:
    (saved / "rank0.safetensors").unlink()
    load(saved, 1, load_format="dummy")


# ---- saving


def test_it_appears_whole_or_not_at_all(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(ValueError, match="holds a broken safetensors file"):
        save_engine_dir(broken, tmp_path / "out" / "engine", tensor_parallel_size=1, dtype="float32")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="tensor_parallel_size is 7; this model has 6 attention heads"):
        save_engine_dir(checkpoint, tmp_path / "out" / "engine", tensor_parallel_size=7, dtype="float32")
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for taken in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(ValueError, match="is there already; give a new or an empty directory"):
            save_engine_dir(checkpoint, taken, tensor_parallel_size=1, dtype="float32")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    save_engine_dir(checkpoint, tmp_path / "empty", tensor_parallel_size=1, dtype="auto")
    manifest = EngineManifest.read(tmp_path / "empty")
    assert manifest is not None
    assert manifest.dtype == "float32"


def test_an_engine_directory_can_be_copied_where_it_fits(saved: Path, tmp_path: Path) -> None:
    save_engine_dir(saved, tmp_path / "copy", tensor_parallel_size=2, dtype="float32")
    assert EngineManifest.read(tmp_path / "copy") == EngineManifest.read(saved)
    load(tmp_path / "copy")
    with pytest.raises(ValueError, match="was saved for tensor_parallel_size 2, asked for 3"):
        save_engine_dir(saved, tmp_path / "other", tensor_parallel_size=3, dtype="float32")


# ---- what is refused


def test_another_size_or_dtype(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"engine was saved for tensor_parallel_size 2, asked for 3"):
        load(saved, 3)
    with pytest.raises(ValueError, match=r"engine was saved in float32, asked for bfloat16"):
        load(saved, dtype="bfloat16")


@pytest.mark.parametrize("name", ["rank1.safetensors", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("place", [0.0, 0.001, 0.5, 0.9, 0.999])
def test_a_flipped_byte(name: str, place: float, saved: Path, tmp_path: Path) -> None:
    data = bytearray((saved / name).read_bytes())
    data[int(len(data) * place)] ^= 0x10
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged, .* changed since saving"):
        load(saved)
    with pytest.raises(ValueError, match=f"{name} is damaged, .* changed since saving"):
        save_engine_dir(saved, tmp_path / "copy", tensor_parallel_size=2, dtype="auto")


@pytest.mark.parametrize("name", ["rank0.safetensors", "rank1.safetensors", "generation_config.json"])
def test_a_missing_file(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load(saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "rank2.safetensors"])
def test_a_file_that_came_later(name: str, saved: Path) -> None:
    (saved / name).write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(ValueError, match=f"{name} came after saving; save it again"):
        load(saved)


def test_a_tensor_that_nothing_reads(tmp_path: Path) -> None:
    """A directory whose files agree with its manifest, but whose weights are another model's."""
    make_model("llama_biases", tmp_path / "model")
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=1, dtype="float32")
    rewrite_config(tmp_path / "engine", lambda fields: fields.update(mlp_bias=False))
    saved = EngineManifest.read(tmp_path / "engine")
    assert saved is not None
    dataclasses.replace(saved, files=record_files(tmp_path / "engine")).write(tmp_path / "engine")
    with pytest.raises(ValueError, match=r"has tensors that this model does not use: .*mlp\.down_proj\.bias"):
        load(tmp_path / "engine", size=1)


def test_a_wrong_size(saved: Path) -> None:
    with (saved / "rank1.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"rank1\.safetensors has \d+ bytes, was saved with \d+"):
        load(saved)


def test_a_missing_manifest(saved: Path) -> None:
    (saved / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=f"has files of an engine directory, but no {MANIFEST_NAME}"):
        load(saved)


def _drop_dtype(fields: dict[str, Any]) -> None:
    del fields["dtype"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(format_version=2), "has format_version 2; this version of tensorweave reads 1"),
        (lambda fields: fields.update(sparsity="2:4", extra=1), "has unknown keys: extra, sparsity"),
        (_drop_dtype, "lacks keys: dtype"),
        (lambda fields: fields.update(model_digest="0" * 32), "is damaged: its fields have changed since saving"),
        (lambda fields: fields["files"].clear(), "is damaged: its fields have changed since saving"),
    ],
)
def test_a_changed_manifest(change: Callable[[dict[str, Any]], None], message: str, saved: Path) -> None:
    fields = json.loads((saved / MANIFEST_NAME).read_text())
    change(fields)
    (saved / MANIFEST_NAME).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize(("text", "message"), [("{", "it is not JSON"), ("[]", "holds a list, must be an object")])
def test_a_manifest_that_is_none(text: str, message: str, saved: Path) -> None:
    (saved / MANIFEST_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(saved)


# ---- digests, dtype and memory


def test_a_digest_notices_every_byte_and_the_length(tmp_path: Path) -> None:
    file = tmp_path / "file"
    sizes = (0, 1, 7, 8, 9, (256 << 10) - 1, 256 << 10, (512 << 10) + 3)
    digests = set()
    for size in sizes:
        file.write_bytes(b"\0" * size)
        digests.add(digest_file(file))
        assert digest_file(file) == digest_tensor(torch.zeros(size, dtype=torch.uint8))
        for place in {0, size // 2, size - 1} - {-1} if size else ():
            data = bytearray(size)
            data[place] = 0x80
            file.write_bytes(data)
            digests.add(digest_file(file))
    different = sum(1 + (len({0, size // 2, size - 1}) if size else 0) for size in sizes)
    assert len(digests) == different


def test_a_digest_is_the_same_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(random.Random(0).randbytes((600 << 10) + 5))
    digest = digest_file(file)
    monkeypatch.setattr("tensorweave.kernels.blocks.operations.native_blocks", lambda: None)
    assert digest_file(file) == digest


@pytest.mark.parametrize(
    ("checkpoint_dtype", "is_fast", "expected"),
    [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float32", True, torch.float32),
        ("float16", True, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu(
    checkpoint_dtype: str, is_fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorweave.workers.gang.device.has_fast_bfloat16", lambda: is_fast)
    assert pick_dtype("auto", checkpoint_dtype, torch.device("cpu")) == expected
    assert pick_dtype("auto", checkpoint_dtype, torch.device("cuda")) == getattr(torch, checkpoint_dtype)


_LOAD_AND_MEASURE = """
import sys
import torch
from pathlib import Path
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.operations import choose_operations
from tensorweave.workers.engine_dir.digest import digest_file, digest_tensor
from tensorweave.workers.engine_dir.directory import open_weights, check_engine_dir
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.models.assembly import build_transformer
from tensorweave.workers.models.families.table import load_model_config

PLACE = MeshRank(1, Mesh(tensor=4))

def kib(field):
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0])

class Watched:
    peak_kib = 0
    def __init__(self, weights):
        self.weights = weights
    def __getattr__(self, name):
        method = getattr(self.weights, name)
        def watched(*arguments):
            part = method(*arguments)
            self.peak_kib = max(self.peak_kib, kib("RssAnon"))
            return part
        return watched

path = Path(sys.argv[1])
config = load_model_config(path)
torch.set_num_threads(1)
load_native(torch.float32)
before = kib("RssAnon")
check_engine_dir(path, PLACE, "float32")
with open_weights(path, config, torch.float32, torch.device("cpu"), PLACE) as weights:
    watched = Watched(weights)
    operations = choose_operations(torch.device("cpu"), torch.float32, config.sizes.head_dim)
    model = build_transformer(config, PLACE, watched, SoloComm(), operations)
print(watched.peak_kib - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_rank_needs_its_share_of_memory(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    make_model("llama", tmp_path / "model", vocab_size=8192, **shape)
    save_engine_dir(tmp_path / "model", tmp_path / "engine", tensor_parallel_size=4, dtype="float32")
    command = [sys.executable, "-c", _LOAD_AND_MEASURE, str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    share_kib = rank_file(tmp_path / "engine", 1).stat().st_size / 1024
    assert int(done.stdout) < share_kib + 4096
