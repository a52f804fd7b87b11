"""From `TorchLlmArgs` to a model engine on this rank: device, dtype, weights, and a KV pool that fits on every rank."""

from __future__ import annotations

import logging
import os

import torch

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import ModelInfo, SamplingDefaults
from tensorweave.kernels.attention.torch_backend import Planner
from tensorweave.kernels.native.library import load_native, use_threads
from tensorweave.workers.engine.engine import PyTorchModelEngine
from tensorweave.workers.engine.kv_pool import KVPool, block_bytes
from tensorweave.workers.engine.memory_need import MemoryNeed, check_memory, kv_bytes, rank_weight_bytes
from tensorweave.workers.engine.pool_size import count_blocks
from tensorweave.workers.engine_dir.directory import check_engine_dir, open_weights
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.device import pick_device, pick_dtype
from tensorweave.workers.models.checkpoint import RandomWeights
from tensorweave.workers.models.config import ModelConfig, load_model_config
from tensorweave.workers.models.generation_config import load_sampling_defaults
from tensorweave.workers.models.loader import WeightLoader, tensor_shapes
from tensorweave.workers.models.rotary import rotary_table
from tensorweave.workers.models.shards import RankShard, shard_model
from tensorweave.workers.models.transformer import Transformer, build_transformer
from tensorweave.workers.store.model_store import resolve_model

logger = logging.getLogger(__name__)

_MOST_READERS = 4


def load_engine(args: TorchLlmArgs, comm: Comm, num_ranks_here: int = 1) -> PyTorchModelEngine:
    """Load this rank's share of `args.model`. Every rank of a gang calls it; they agree on the number of KV blocks.
    `num_ranks_here` of them do it on this host.

    Raises:
        ValueError: the model's files or the arguments are wrong, or the model or its KV cache does not fit; the message
            names which.
    """
    path = resolve_model(args.model, revision=args.revision)
    saved = None if args.load_format == "dummy" else check_engine_dir(path, comm.size, args.dtype, comm.rank)
    config = load_model_config(path)
    defaults = load_sampling_defaults(path, args.generation_config)
    shard = shard_model(config, comm.rank, comm.size)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype if saved is None else saved.dtype, config.checkpoint_dtype, device)
    kv = args.kv_cache_config
    size = block_bytes(config.num_layers, len(shard.heads.kv), kv.tokens_per_block, config.head_dim, dtype)
    activations = _activation_bytes(args, config, shard, dtype)
    weights_bytes = rank_weight_bytes(config, shard, tensor_shapes(config), dtype)
    on_gpu = activations if device.type == "cuda" else 0  # as `count_blocks` does
    check_memory(MemoryNeed(weights_bytes, kv_bytes(kv, size), on_gpu, kv.max_tokens), device, num_ranks_here)
    num_threads = args.num_threads or max(1, len(os.sched_getaffinity(0)) // comm.size)
    if device.type == "cpu":
        _set_threads(num_threads, dtype)
    if args.load_format == "dummy":
        weights = WeightLoader(RandomWeights(tensor_shapes(config)), dtype, device)
        model = build_transformer(config, shard, weights, comm)
    else:
        with open_weights(path, config, dtype, device, comm.rank, min(num_threads, _MOST_READERS)) as loaded:
            model = build_transformer(config, shard, loaded, comm)
    num_blocks = comm.agree_min(count_blocks(kv, size, device, activations))
    return assemble_engine(model, config, shard, num_blocks, args, dtype, device, defaults)


def assemble_engine(
    model: Transformer,
    config: ModelConfig,
    shard: RankShard,
    num_blocks: int,
    args: TorchLlmArgs,
    dtype: torch.dtype,
    device: torch.device,
    defaults: SamplingDefaults,
) -> PyTorchModelEngine:
    """Put KV pool, planner and tables around a model."""
    P, K = args.kv_cache_config.tokens_per_block, len(shard.heads.kv)
    max_seq_len = min(config.max_seq_len, num_blocks * P, args.max_seq_len or config.max_seq_len)
    if args.max_seq_len is not None and args.max_seq_len > max_seq_len:
        cause = "the model's own limit" if max_seq_len == config.max_seq_len else "the KV cache has no room for more"
        logger.warning("max_seq_len is %d instead of %d: %s", max_seq_len, args.max_seq_len, cause)
    info = ModelInfo(
        model=str(args.model),
        vocab_size=config.vocab_size,
        max_seq_len=max_seq_len,
        dtype=str(dtype).removeprefix("torch."),
        tokens_per_block=P,
        num_blocks=num_blocks,
        end_ids=config.end_ids,
        kv_bytes_per_token=block_bytes(config.num_layers, config.num_kv_heads, 1, config.head_dim, dtype),
        sampling_defaults=defaults,
    )
    return PyTorchModelEngine(
        model=model,
        pool=KVPool(config.num_layers, num_blocks, K, P, config.head_dim, dtype, device, shard.heads.kv.start),
        planner=Planner(K, shard.heads.read_heads, P, config.head_dim, device, dtype),
        rope_table=rotary_table(config.rope, config.head_dim, max_seq_len, device),
        windows=frozenset(config.windows),
        info=info,
    )


def _set_threads(num_threads: int, dtype: torch.dtype) -> None:
    """Where the native kernels have the threads, torch gets one: its idle threads spin for milliseconds on cores that
    the kernels' need."""
    is_native = load_native(dtype) is not None and use_threads(num_threads)
    torch.set_num_threads(1 if is_native else num_threads)


def _activation_bytes(args: TorchLlmArgs, config: ModelConfig, shard: RankShard, dtype: torch.dtype) -> int:
    """One step's temporaries, from above: hidden states, two of the widest products, three of float32 logits."""
    widest = max(2 * len(shard.intermediate), 2 * len(shard.heads.query) * config.head_dim)
    hidden = args.max_num_tokens * (4 * config.hidden_size + 2 * widest) * dtype.itemsize
    return hidden + 3 * args.max_batch_size * config.vocab_size * torch.float32.itemsize
