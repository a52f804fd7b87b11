"""Mixtures of experts in engines and gangs: engine directories, two gangs, reused prefixes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.linear.native import PackedLinear
from tensorweave.kernels.linear.reference import TorchLinear
from tensorweave.kernels.mixture.native import NativeExperts
from tensorweave.kernels.mixture.reference import EachExpert
from tensorweave.kernels.native.library import load_native
from tensorweave.kernels.operations import choose_operations, reference_operations
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine.memory_need import rank_weight_bytes
from tensorweave.workers.engine_dir.directory import save_engine_dir
from tensorweave.workers.engine_dir.manifest import EngineManifest, rank_file
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.models.assembly import build_transformer
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.mixture import Mixture
from tensorweave.workers.models.stack import TorchStack
from tests.workers.engine_drive import ThreadComm, engine_args, generate_on_ranks, random_prompts, run_ranks
from tests.workers.tiny_models import make_model, their_greedy
from tests.workers.transfer_drive import Gang, run_disaggregated, tcp_carriers

PROMPTS = random_prompts(4, 70, seed=8)
NUM_TOKENS = 6
CPU = torch.device("cpu")


def test_an_engine_directory_keeps_each_ranks_experts(tmp_path: Path) -> None:
    model = make_model("qwen2_moe", tmp_path / "model")
    engine = tmp_path / "engine"
    save_engine_dir(tmp_path / "model", engine, tensor_parallel_size=2, dtype="float32", moe_expert_parallel_size=2)
    expected = their_greedy(model, PROMPTS, NUM_TOKENS)
    assert generate_on_ranks(engine, 2, PROMPTS, NUM_TOKENS, dtype="auto", expert=2) == expected
    for rank, numbers in enumerate(({0, 1, 2, 3}, {4, 5, 6})):
        with safe_open(str(rank_file(engine, rank)), framework="pt") as file:
            names = [name for name in file.keys() if ".mlp.experts." in name]  # noqa: SIM118
        assert {int(name.split(".")[5]) for name in names} == numbers
    with pytest.raises(ValueError, match="was saved for moe_expert_parallel_size 2, asked for 1"):
        generate_on_ranks(engine, 2, PROMPTS, NUM_TOKENS, dtype="auto")
    manifest = EngineManifest.read(engine)
    assert manifest is not None
    assert manifest.moe_expert_parallel_size == 2
    with pytest.raises(ValueError, match="moe_expert_parallel_size is 3, must divide tensor_parallel_size"):
        save_engine_dir(engine, tmp_path / "copy", tensor_parallel_size=2, dtype="auto", moe_expert_parallel_size=3)


def moe_gang(path: Path, mesh: Mesh, name: str) -> Gang:
    def make_engine(comm: Comm) -> Any:
        if isinstance(comm, ThreadComm):
            comm.divide_experts(mesh.expert)
        return load_engine(engine_args(path), comm)

    return Gang(make_engine, mesh.tensor, tcp_carriers, name=name)


def test_gangs_that_share_experts_otherwise_exchange_kv(tmp_path: Path) -> None:
    """The second time, prompts are found in both caches."""
    model = make_model("qwen3_moe", tmp_path)
    expected = their_greedy(model, PROMPTS, NUM_TOKENS)
    samplings = [SamplingSpec(max_tokens=NUM_TOKENS)] * len(PROMPTS)
    with moe_gang(tmp_path, Mesh(tensor=2, expert=2), "P") as prefill, moe_gang(tmp_path, Mesh(), "D") as decode:
        for name in ("cold", "warm"):
            answers = run_disaggregated(prefill, decode, PROMPTS, samplings, name)
            assert [answer.tokens for answer in answers] == expected
        assert any(answer.num_cached_tokens for answer in answers)
        assert decode.failures() == {}
        assert decode.gauge("kv_transfer_blocks_total") > 0


def mixtures_of(path: Path, dtype: torch.dtype, *, is_native: bool) -> list[Mixture]:
    operations = choose_operations(CPU, dtype, 8) if is_native else reference_operations(CPU, dtype)
    config = load_model_config(path)
    with SafetensorsDirectory(path) as source:
        model = build_transformer(config, SoloComm.place, WeightLoader(source, dtype, CPU), SoloComm(), operations)
    assert isinstance(model.stack, TorchStack)
    return [layer.mlp for layer in model.stack.layers if isinstance(layer.mlp, Mixture)]


@pytest.mark.skipif(load_native(torch.float32) is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model("qwen2_moe", tmp_path)
    [mixture, *_] = mixtures_of(tmp_path, dtype, is_native=True)
    [slow, *_] = mixtures_of(tmp_path, dtype, is_native=False)
    assert isinstance(mixture.routed.experts, NativeExperts)
    assert len(mixture.shared) == 1
    x, inputs = torch.randn(40, 48).to(dtype), Any
    whole = mixture(x, inputs)  # type: ignore[arg-type]
    for rows in (slice(0, 1), slice(5, 12), slice(39, 40)):
        assert torch.equal(mixture(x[rows], inputs), whole[rows])  # type: ignore[arg-type]
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(whole, slow(x, inputs), atol=tolerance, rtol=tolerance)  # type: ignore[arg-type]


def test_plain_experts_may_be_asked_for(tmp_path: Path) -> None:
    model = make_model("mixtral", tmp_path)
    engine = load_engine(engine_args(tmp_path, moe_config={"backend": "VANILLA"}), SoloComm())
    stack = engine._model.stack  # type: ignore[union-attr]
    assert isinstance(stack, TorchStack)
    mlp = stack.layers[0].mlp
    assert isinstance(mlp, Mixture)
    assert isinstance(mlp.routed.experts, EachExpert)
    assert mlp.shared == ()
    expected = their_greedy(model, PROMPTS, NUM_TOKENS)
    assert generate_on_ranks(tmp_path, 1, PROMPTS, NUM_TOKENS, moe_config={"backend": "VANILLA"}) == expected


def test_random_weights(tmp_path: Path) -> None:
    """The same whatever the mesh."""
    make_model("mixtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    one = generate_on_ranks(tmp_path, 1, PROMPTS[:2], 4, load_format="dummy")
    assert generate_on_ranks(tmp_path, 2, PROMPTS[:2], 4, load_format="dummy", expert=2) == one


def test_the_memory_of_a_rank_is_counted_before_it_is_read(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path, num_local_experts=6, hidden_size=48)
    config = load_model_config(tmp_path)
    expert = 3 * 40 * 48 * 4
    whole = rank_weight_bytes(config, SoloComm.place, torch.float32)
    for mesh in (Mesh(tensor=2, expert=2), Mesh(tensor=2)):
        halves = [rank_weight_bytes(config, place, torch.float32) for place in mesh.ranks()]
        routers = 3 * 6 * 48 * 4  # which every rank has
        assert sum(halves) == whole + routers
        assert abs(halves[0] - halves[1]) < expert, "each has half of all experts"


def test_experts_of_a_dense_model_cannot_be_divided(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(ValueError, match="moe_expert_parallel_size is 2; this model has no experts to share"):
        run_ranks(2, lambda comm: load_engine(engine_args(tmp_path), comm), expert=2)


def test_experts_may_be_quantized(tmp_path: Path) -> None:
    """Routers and the gates of shared experts stay as they are."""
    make_model("qwen2_moe", tmp_path / "model")
    engine = load_engine(engine_args(tmp_path / "model", quant_config={"quant_algo": "W8A16"}), SoloComm())
    mlp = engine._model.stack.layers[0].mlp  # type: ignore[union-attr]
    assert isinstance(mlp, Mixture)
    linears = [linear for expert in mlp.routed.experts.group.experts for linear in (expert.gate_up, expert.down)]
    assert not any(isinstance(linear, PackedLinear | TorchLinear) for linear in linears)
    kept = (mlp.routed.router, mlp.shared[0].gate.linear)
    assert all(isinstance(linear, PackedLinear | TorchLinear) for linear in kept)
    out = tmp_path / "engine"
    save_engine_dir(tmp_path / "model", out, tensor_parallel_size=1, dtype="float32", quantization="w8a16")
    knobs = {"quant_config": {"quant_algo": "W8A16"}}
    expected = generate_on_ranks(tmp_path / "model", 1, PROMPTS, NUM_TOKENS, **knobs)
    assert generate_on_ranks(out, 1, PROMPTS, NUM_TOKENS, dtype="auto") == expected
