"""`ModelShare`: which part of a model a rank computes, and in what form, by `TorchLlmArgs` and the model's files.
`load_engine` builds an engine around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from tensorweave.cluster.llm_args import TorchLlmArgs, adapter_config, kv_cache_dtype
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.quant_config import weight_quantization
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.kernels.mixture.reference import EachExpert
from tensorweave.kernels.mixture.stack import stack_experts
from tensorweave.kernels.operations import Operations, choose_operations, reference_operations
from tensorweave.kernels.weights import FP8
from tensorweave.workers.engine.engine_choice import check_gpu_engine, fits_device_engine
from tensorweave.workers.engine.gpu_weights import check_gpu_weights
from tensorweave.workers.engine.kv_pool import block_bytes
from tensorweave.workers.engine.memory_need import MemoryNeed, kv_bytes, rank_weight_bytes
from tensorweave.workers.engine_dir.directory import check_engine_dir, open_weights
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.device import check_fp8, pick_device, pick_dtype
from tensorweave.workers.lora.rank_adapter import AdapterLimits
from tensorweave.workers.models.adapter_sites import LinearForms
from tensorweave.workers.models.assembly import build_stage, check_mesh, stage_layers, tensor_shapes
from tensorweave.workers.models.checkpoint import RandomWeights
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization, check_kv_scales
from tensorweave.workers.models.quantizing import quantizing
from tensorweave.workers.models.rank_weights import RankWeights
from tensorweave.workers.models.shards import HeadShard, shard_heads, split_evenly
from tensorweave.workers.models.transformer import Stage
from tensorweave.workers.store.model_store import resolve_model

logger = logging.getLogger(__name__)

_MOST_READERS: Final = {"cpu": 4, "cuda": 8}


@dataclass(frozen=True, slots=True)
class ModelShare:
    """One rank's part of a model: which, where it goes, and in what type."""

    path: Path
    config: ModelConfig
    place: MeshRank
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    quantization: str | None
    has_plain_attention: bool
    has_plain_experts: bool
    is_on_device: bool
    adapters: AdapterLimits | None

    @property
    def heads(self) -> HeadShard:
        sizes, place = self.config.sizes, self.place
        return shard_heads(sizes.num_heads, sizes.num_kv_heads, place.mesh.tensor)[place.tensor]

    @property
    def num_layers(self) -> int:
        """The layers of this rank's pipeline stage."""
        return len(stage_layers(self.config, self.place))

    def block_bytes(self, tokens_per_block: int) -> int:
        """The bytes of one KV block on this rank."""
        sizes = self.config.sizes
        return block_bytes(self.num_layers, len(self.heads.kv), tokens_per_block, sizes.head_dim, self.kv_dtype)

    def activation_bytes(self, args: TorchLlmArgs) -> int:
        """An upper bound of one step's temporaries: hidden states, two of the widest products, three of float32
        logits."""
        sizes, tensor = self.config.sizes, self.place.mesh.tensor
        most = StepSettings.of(args, self.device.type)
        intermediate = len(split_evenly(sizes.intermediate_size, tensor)[self.place.tensor])
        widest = max(2 * intermediate, 2 * len(self.heads.query) * sizes.head_dim)
        hidden = most.max_num_tokens * (4 * sizes.hidden_size + 2 * widest) * self.dtype.itemsize
        return hidden + 3 * most.max_samples * sizes.vocab_size * torch.float32.itemsize

    def memory_need(self, args: TorchLlmArgs) -> MemoryNeed:
        kv = args.kv_cache_config
        return MemoryNeed(
            weights=rank_weight_bytes(self.config, self.place, self.dtype, self.quantization),
            kv_cache=kv_bytes(kv, self.block_bytes(kv.tokens_per_block)),
            activations=self.activation_bytes(args) if self.device.type == "cuda" else 0,  # as `count_blocks` does
            kv_tokens=kv.max_tokens,
        )

    @property
    def operations(self) -> Operations:
        if self.is_on_device:
            return replace(reference_operations(self.device, self.dtype), make_experts=stack_experts)
        head_dim = self.config.sizes.head_dim
        chosen = choose_operations(self.device, self.dtype, head_dim, has_plain_attention=self.has_plain_attention)
        return replace(chosen, make_experts=EachExpert) if self.has_plain_experts else chosen

    def read_weights(
        self,
        load_format: str,
        comm: Comm,
        num_threads: int,
        linears: LinearForms,
        on_progress: Callable[[float], object],
    ) -> Stage:
        if load_format == "dummy":
            random = RandomWeights(tensor_shapes(self.config), device=self.device)
            return self._build(WeightLoader(random, self.dtype, self.device), comm, linears)
        if self.kv_dtype == FP8 and self.config.quantization is not None:
            check_kv_scales(self.path)
        num_readers = min(num_threads, _MOST_READERS[self.device.type])
        with open_weights(
            self.path, self.config, self.dtype, self.device, self.place, num_readers, on_progress
        ) as weights:
            return self._build(weights, comm, linears)

    def _build(self, weights: RankWeights, comm: Comm, linears: LinearForms) -> Stage:
        wanted = quantizing(weights, self.quantization)
        return build_stage(self.config, self.place, wanted, comm, self.operations, self.dtype, linears)


def find_share(args: TorchLlmArgs, place: MeshRank, is_on_device: bool | None) -> ModelShare:
    """What the rank at `place` loads of `args.model`; see `load_engine`. Raises ValueError."""
    path = resolve_model(args.model, revision=args.revision)
    quantization: str | None = weight_quantization(args.quant_config)
    saved = None if args.load_format == "dummy" else check_engine_dir(path, place, args.dtype, quantization)
    config = load_model_config(path)
    check_mesh(config, place)
    if args.max_seq_len is None:
        _tell_of_longrope(config)
    device = pick_device(args.device)
    if place.mesh.pipeline > 1 and (device.type == "cuda" or is_on_device):
        raise ValueError(
            f"pipeline_parallel_size is {place.mesh.pipeline}: pipeline stages are for CPUs so far (device='cpu'); on "
            f"GPUs use tensor_parallel_size"
        )
    if config.quantization is not None:
        _check_quantized(config.quantization, quantization, args.load_format)
    dtype = pick_dtype(args.dtype if saved is None else saved.dtype, config.checkpoint_dtype, device)
    quantization = quantization if saved is None else saved.quantization
    kv_dtype = FP8 if kv_cache_dtype(args) == "fp8" else dtype
    if kv_dtype == FP8:
        check_fp8(device)
    if is_on_device is None:
        is_on_device = fits_device_engine(config, args, place, device)
    if device.type == "cuda":
        check_gpu_engine(config, args, place, is_on_device=is_on_device)
        check_gpu_weights(config, quantization, device, is_on_device=is_on_device)
    return ModelShare(
        path,
        config,
        place,
        device,
        dtype,
        kv_dtype=kv_dtype,
        quantization=quantization,
        has_plain_attention=args.attn_backend == "VANILLA",
        has_plain_experts=args.moe_config.backend == "VANILLA",
        is_on_device=is_on_device,
        adapters=_adapter_limits(args),
    )


def _adapter_limits(args: TorchLlmArgs) -> AdapterLimits | None:
    config = adapter_config(args)
    return None if config is None else AdapterLimits(config.max_lora_rank, tuple(config.lora_target_modules))


def _tell_of_longrope(config: ModelConfig) -> None:
    if config.default_seq_len < config.max_seq_len:
        logger.warning(
            "sequences end at %d tokens, where this model's longrope changes its factors; with a larger max_seq_len "
            "(at most %d) all sequences have those for long ones",
            config.default_seq_len,
            config.max_seq_len,
        )


def _check_quantized(found: CheckpointQuantization, wanted: str | None, load_format: str) -> None:
    """Raises ValueError for what checkpoints that come quantized are not combined with."""
    where = f"the checkpoint comes quantized (quant_method {found.method!r})"
    if wanted is not None:
        raise ValueError(f"{where}: leave quant_config.quant_algo out, or take a checkpoint that is not quantized")
    if load_format == "dummy":
        raise ValueError(f"{where}: load_format 'dummy' makes weights that are not quantized; take such a config.json")
