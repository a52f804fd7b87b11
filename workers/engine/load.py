"""From `TorchLlmArgs` to a model engine on this rank: device, dtype, weights, and a KV pool that fits on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from tensorweave.cluster.cuda_graph_config import graph_sizes
from tensorweave.cluster.llm_args import TorchLlmArgs, adapter_config, kv_cache_dtype
from tensorweave.cluster.lora_config import most_in_step
from tensorweave.cluster.mesh import MeshRank
from tensorweave.cluster.protocol import ModelInfo, SamplingDefaults
from tensorweave.cluster.quant_config import weight_quantization
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.kernels.attention.backend import AttentionShape
from tensorweave.kernels.mixture.reference import EachExpert
from tensorweave.kernels.mixture.stack import stack_experts
from tensorweave.kernels.native.library import load_native, use_threads
from tensorweave.kernels.operations import (
    Operations,
    choose_device_operations,
    choose_operations,
    choose_split_operations,
    reference_operations,
)
from tensorweave.kernels.weights import FP8
from tensorweave.workers.engine.adapter_rows import AdapterRows
from tensorweave.workers.engine.compute_thread import ComputeThread
from tensorweave.workers.engine.device.adapter_places import (
    AdapterPlaces,
    HostAdapters,
    NoAdapterPlaces,
    PlacesAdapters,
    make_stacks,
)
from tensorweave.workers.engine.device.builder import DeviceEngineBuilder
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.device.graphs import GraphSizes
from tensorweave.workers.engine.device.rank_exchange import make_exchange
from tensorweave.workers.engine.device_memory import naming_knobs
from tensorweave.workers.engine.engine import HeadOutput, PyTorchModelEngine, StageOutput
from tensorweave.workers.engine.engine_choice import check_gpu_engine, fits_device_engine
from tensorweave.workers.engine.gpu_weights import check_gpu_weights
from tensorweave.workers.engine.kv_pool import KVPool, block_bytes
from tensorweave.workers.engine.memory_need import MemoryNeed, check_memory, kv_bytes, rank_weight_bytes
from tensorweave.workers.engine.pool_size import count_blocks
from tensorweave.workers.engine_dir.directory import check_engine_dir, open_weights
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.device import check_fp8, pick_device, pick_dtype
from tensorweave.workers.lora.rank_adapter import AdapterLimits, AdapterReader
from tensorweave.workers.models.adapter_sites import AdaptedLinears, LinearForms, PlainLinears
from tensorweave.workers.models.assembly import (
    build_stage,
    check_mesh,
    sites_of_other_stages,
    stage_layers,
    tensor_shapes,
)
from tensorweave.workers.models.checkpoint import RandomWeights
from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel, take_model
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.generation_config import load_sampling_defaults
from tensorweave.workers.models.loader import WeightLoader
from tensorweave.workers.models.quantized.checkpoint_quantization import CheckpointQuantization, check_kv_scales
from tensorweave.workers.models.quantizing import quantizing
from tensorweave.workers.models.rank_weights import RankWeights
from tensorweave.workers.models.rotary import rotary_table
from tensorweave.workers.models.shards import HeadShard, shard_heads, split_evenly
from tensorweave.workers.models.transformer import Stage, Transformer
from tensorweave.workers.start_log import StartLog
from tensorweave.workers.store.model_store import resolve_model

logger = logging.getLogger(__name__)

_MOST_READERS: Final = {"cpu": 4, "cuda": 8}


def load_engine(
    args: TorchLlmArgs,
    comm: Comm,
    num_ranks_here: int = 1,
    log: StartLog | None = None,
    *,
    is_on_device: bool | None = None,
) -> PyTorchModelEngine | DeviceEngine:
    """Load this rank's share of `args.model`. Every rank of a gang calls it; they agree on the number of KV blocks.

    Args:
        num_ranks_here: ranks of the gang that load at the same time on this host.
        log: told of each part.
        is_on_device: whether steps keep their state on the device; None: on a GPU that has kernels for the model.

    Raises:
        ValueError: the model's files or the arguments are wrong, or the model or its KV cache does not fit; the message
            names which.
    """
    share = _find_share(args, comm.place, is_on_device)
    defaults = load_sampling_defaults(share.path, args.generation_config)
    check_memory(share.memory_need(args), share.device, num_ranks_here)
    num_threads = args.num_threads or max(1, len(os.sched_getaffinity(0)) // comm.size)
    if share.device.type == "cpu":
        _set_threads(num_threads, share.dtype)
    log = log or StartLog()
    linears = PlainLinears() if share.adapters is None else AdaptedLinears()
    with log.part("loading the weights") as tell:
        model = share.read_weights(args.load_format, comm, num_threads, linears, tell)
        if share.device.type == "cuda":
            torch.cuda.synchronize(share.device)
    if share.is_on_device:
        assert isinstance(model, Transformer)
        return _build_device_engine(model, share, args, defaults, comm, log, linears)
    kv, block_bytes = args.kv_cache_config, share.block_bytes(args.kv_cache_config.tokens_per_block)
    num_blocks = comm.agree_min(count_blocks(kv, block_bytes, share.device, share.activation_bytes(args)))
    info = replace(_describe(share, num_blocks, args, defaults), embedding_size=share.config.sizes.hidden_size)
    return _assemble_engine(model, share, info, linears, comm)


@dataclass(frozen=True, slots=True)
class _ModelShare:
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
        """Of this rank's pipeline stage."""
        return len(stage_layers(self.config, self.place))

    def block_bytes(self, tokens_per_block: int) -> int:
        """Of one KV block on this rank."""
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


def _find_share(args: TorchLlmArgs, place: MeshRank, is_on_device: bool | None) -> _ModelShare:
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
    return _ModelShare(
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


def _describe(share: _ModelShare, num_blocks: int, args: TorchLlmArgs, defaults: SamplingDefaults) -> ModelInfo:
    config, sizes, P = share.config, share.config.sizes, args.kv_cache_config.tokens_per_block
    return ModelInfo(
        model=str(args.model),
        vocab_size=sizes.vocab_size,
        max_seq_len=_limit_length(
            args.max_seq_len, config.max_seq_len if args.max_seq_len else config.default_seq_len, num_blocks * P
        ),
        dtype=str(share.dtype).removeprefix("torch."),
        tokens_per_block=P,
        num_blocks=num_blocks,
        end_ids=config.end_ids,
        kv_bytes_per_token=block_bytes(sizes.num_layers, sizes.num_kv_heads, 1, sizes.head_dim, share.kv_dtype),
        sampling_defaults=defaults,
    )


def _make_pool(share: _ModelShare, info: ModelInfo) -> KVPool:
    sizes, heads = share.config.sizes, share.heads
    with naming_knobs("the KV cache", "kv_cache_config.max_tokens or free_gpu_memory_fraction"):
        return KVPool(
            share.num_layers,
            info.num_blocks,
            len(heads.kv),
            info.tokens_per_block,
            sizes.head_dim,
            share.kv_dtype,
            share.device,
            heads.kv.start,
        )


def _build_device_engine(
    model: Transformer,
    share: _ModelShare,
    args: TorchLlmArgs,
    defaults: SamplingDefaults,
    comm: Comm,
    log: StartLog,
    linears: LinearForms,
) -> DeviceEngine:
    kv, device, settings = args.kv_cache_config, share.device, StepSettings.of(args, share.device.type)
    longest = min(args.max_seq_len or share.config.default_seq_len, share.config.max_seq_len)
    head_dim = share.config.sizes.head_dim
    device_model = take_model(model, [rotary_table(rope, head_dim, longest, device) for rope in share.config.ropes])
    adapters, reader = _device_adapters(share, args, linears, device_model)
    graphs = GraphSizes()
    if args.cuda_graph_config is not None:
        sizes = graph_sizes(args.cuda_graph_config, settings.max_batch_size)
        graphs = GraphSizes(sizes, args.cuda_graph_config.enable_padding)
    operations = choose_device_operations(device) if comm.size == 1 else choose_split_operations(device)
    max_rows, max_tokens = settings.max_samples, max(settings.max_num_tokens, settings.max_samples)
    ranks = make_exchange(device_model, operations, comm, max_tokens, max_rows)
    buffers = StepBuffers.create(device_model, max_tokens, max_rows, ranks.sums)
    builder = DeviceEngineBuilder(device_model, operations, buffers, graphs, ranks, adapters, reader)

    def make(num_blocks: int) -> DeviceEngine:
        info = _describe(share, num_blocks, args, defaults)
        return builder.make(_make_pool(share, info), info)

    def reserve() -> int:
        trial = make(-(-settings.max_num_tokens // kv.tokens_per_block) + 1)
        builder.compile(trial, log)
        return builder.measure(trial)

    is_measured = device.type == "cuda" and kv.max_tokens is None
    reserved = reserve() if is_measured else 0
    num_blocks = comm.agree_min(count_blocks(kv, share.block_bytes(kv.tokens_per_block), device, reserved))
    engine = make(num_blocks)
    if not is_measured:
        builder.compile(engine, log)
    builder.warm_up(engine, log)
    return engine


def _device_adapters(
    share: _ModelShare, args: TorchLlmArgs, linears: LinearForms, model: DeviceModel
) -> tuple[Callable[[], PlacesAdapters], AdapterReader | None]:
    """Engines over one model, of which one runs at a time, share the memory of their adapters."""
    config = adapter_config(args)
    if config is None or share.adapters is None or not isinstance(linears, AdaptedLinears):
        return NoAdapterPlaces, None
    interleaved = {layer.sites.gate_up for layer in model.layers if layer.sites is not None}
    room = share.adapters.max_rank, share.dtype, share.device
    stacks = make_stacks(linears.sites, interleaved, most_in_step(config), *room)
    kernels = HostAdapters(is_pinned=share.device.type == "cuda")
    reader = AdapterReader(linears.sites, kernels, share.dtype, torch.device("cpu"), share.adapters)
    return lambda: AdapterPlaces(stacks), reader


def _assemble_engine(
    model: Stage, share: _ModelShare, info: ModelInfo, linears: LinearForms, comm: Comm
) -> PyTorchModelEngine:
    """Put KV pool, attention and rotation table around a model."""
    config, device, operations = share.config, share.device, share.operations
    reader = None
    if share.adapters is not None and isinstance(linears, AdaptedLinears):
        elsewhere = sites_of_other_stages(config, share.place)
        reader = AdapterReader(linears.sites, operations.adapters, share.dtype, device, share.adapters, elsewhere)
    heads, P, H = share.heads, info.tokens_per_block, config.sizes.head_dim
    has_stages = share.place.mesh.pipeline > 1
    return PyTorchModelEngine(
        model=model,
        output=HeadOutput(model, info.vocab_size) if isinstance(model, Transformer) else StageOutput(comm.stages),
        pool=_make_pool(share, info),
        attention=operations.make_attention(
            AttentionShape(len(heads.kv), heads.read_heads, H, P, frozenset(config.windows))
        ),
        rope_tables=[rotary_table(rope, H, info.max_seq_len, device) for rope in config.ropes],
        info=info,
        adapter_reader=reader,
        adapter_rows=None if reader is None else AdapterRows(operations.adapters),
        thread=ComputeThread(f"stage-{share.place.pipeline}", comm.stages.note_computed) if has_stages else None,
    )


def _limit_length(wanted: int | None, model_limit: int, num_kv_tokens: int) -> int:
    limit = min(model_limit, num_kv_tokens)
    if wanted is None or wanted <= limit:
        return wanted or limit
    cause = "the model's own limit" if limit == model_limit else "the KV cache has no room for more"
    logger.warning("max_seq_len is %d instead of %d: %s", limit, wanted, cause)
    return limit


def _set_threads(num_threads: int, dtype: torch.dtype) -> None:
    """Where the native kernels have the threads, torch gets one: its idle threads spin for milliseconds on cores that
    the kernels' need."""
    is_native = load_native(dtype) is not None and use_threads(num_threads)
    torch.set_num_threads(1 if is_native else num_threads)
