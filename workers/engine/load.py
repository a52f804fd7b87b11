"""From `TorchLlmArgs` to a model engine on this rank: its share of the model, and a KV pool that fits on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from tensorweave.cluster.cuda_graph_config import graph_sizes
from tensorweave.cluster.llm_args import TorchLlmArgs, adapter_config
from tensorweave.cluster.lora_config import most_in_step
from tensorweave.cluster.protocol import ModelInfo, SamplingDefaults
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.kernels.attention.backend import AttentionShape
from tensorweave.kernels.native.library import load_native, use_threads
from tensorweave.kernels.operations import choose_device_operations, choose_split_operations
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
from tensorweave.workers.engine.kv_pool import KVPool, block_bytes
from tensorweave.workers.engine.memory_need import check_memory
from tensorweave.workers.engine.model_share import ModelShare, find_share
from tensorweave.workers.engine.pool_size import count_blocks
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.lora.rank_adapter import AdapterReader
from tensorweave.workers.models.adapter_sites import AdaptedLinears, LinearForms, PlainLinears
from tensorweave.workers.models.assembly import sites_of_other_stages
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel, take_model
from tensorweave.workers.models.generation_config import load_sampling_defaults
from tensorweave.workers.models.rotary import rotary_table
from tensorweave.workers.models.transformer import Stage, Transformer
from tensorweave.workers.start_log import StartLog

logger = logging.getLogger(__name__)


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
    share = find_share(args, comm.place, is_on_device)
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


def _describe(share: ModelShare, num_blocks: int, args: TorchLlmArgs, defaults: SamplingDefaults) -> ModelInfo:
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


def _make_pool(share: ModelShare, info: ModelInfo) -> KVPool:
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
    share: ModelShare,
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
    with log.part("connecting the ranks") if comm.size > 1 else contextlib.nullcontext():
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
    share: ModelShare, args: TorchLlmArgs, linears: LinearForms, model: DeviceModel
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
    model: Stage, share: ModelShare, info: ModelInfo, linears: LinearForms, comm: Comm
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
