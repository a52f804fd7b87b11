"""From `TorchLlmArgs` to a model engine on this rank: device, dtype, weights, and a KV pool that fits on every rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.native import load_native, use_threads
from tensorweave.kernels.paged_attention import Planner
from tensorweave.workers.checkpoint import RandomWeights, SafetensorsDirectory, check_tensors
from tensorweave.workers.comm import Comm
from tensorweave.workers.engine import PyTorchModelEngine
from tensorweave.workers.kv_pool import KVPool, block_bytes
from tensorweave.workers.model_store import resolve_model
from tensorweave.workers.models.config import ModelConfig, load_model_config
from tensorweave.workers.models.loader import HEAD, IGNORED_SUFFIXES, WeightLoader, tensor_shapes
from tensorweave.workers.models.rotary import rotary_table
from tensorweave.workers.models.shards import RankShard, shard_model
from tensorweave.workers.models.transformer import Transformer, build_transformer

_GIB = 1 << 30


def load_engine(args: TorchLlmArgs, comm: Comm) -> PyTorchModelEngine:
    """Load this rank's share of `args.model`. Every rank of a gang calls it; they agree on the number of KV blocks.

    Raises:
        ValueError: the model's files or the arguments are wrong, or the KV cache does not fit; the message names which.
    """
    path = resolve_model(args.model, revision=args.revision)
    config = load_model_config(path)
    shard = shard_model(config, comm.rank, comm.size)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, config.checkpoint_dtype, device)
    if device.type == "cpu":
        _set_threads(args.num_threads or max(1, len(os.sched_getaffinity(0)) // comm.size), dtype)
    model = _load_weights(args.load_format, path, config, shard, dtype, device, comm)
    num_blocks = comm.agree_min(_num_blocks(args, config, shard, dtype, device))
    return assemble_engine(model, config, shard, num_blocks, args, dtype, device)


def assemble_engine(
    model: Transformer,
    config: ModelConfig,
    shard: RankShard,
    num_blocks: int,
    args: TorchLlmArgs,
    dtype: torch.dtype,
    device: torch.device,
) -> PyTorchModelEngine:
    """Put KV pool, planner and tables around a model."""
    P, K = args.kv_cache_config.tokens_per_block, len(shard.heads.kv)
    max_seq_len = min(config.max_seq_len, num_blocks * P, args.max_seq_len or config.max_seq_len)
    info = ModelInfo(
        model=str(args.model),
        vocab_size=config.vocab_size,
        max_seq_len=max_seq_len,
        dtype=str(dtype).removeprefix("torch."),
        tokens_per_block=P,
        num_blocks=num_blocks,
        end_ids=config.end_ids,
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


def pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU")
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def pick_dtype(wanted: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """'auto' is the checkpoint's; on a CPU, float32 unless that is bfloat16 and the CPU multiplies it fast."""
    if wanted == "auto":
        is_slow = device.type == "cpu" and not (checkpoint_dtype == "bfloat16" and has_fast_bfloat16())
        wanted = "float32" if is_slow else checkpoint_dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has bfloat16 dot products or tiles; False where the system does not say."""
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def _load_weights(
    load_format: str,
    path: Path,
    config: ModelConfig,
    shard: RankShard,
    dtype: torch.dtype,
    device: torch.device,
    comm: Comm,
) -> Transformer:
    shapes = tensor_shapes(config)
    if load_format == "dummy":
        return build_transformer(config, shard, WeightLoader(RandomWeights(shapes), dtype, device), comm)
    with SafetensorsDirectory(path) as source:
        tied = (HEAD,) if config.has_tied_embeddings else ()
        check_tensors(source, shapes, ignored=(*IGNORED_SUFFIXES, *tied))
        return build_transformer(config, shard, WeightLoader(source, dtype, device), comm)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Bytes that this rank's KV cache may take, and all that is free."""

    share: int
    free: int


def _num_blocks(
    args: TorchLlmArgs, config: ModelConfig, shard: RankShard, dtype: torch.dtype, device: torch.device
) -> int:
    """Blocks for this rank: `max_tokens` where given, else what its share of memory holds."""
    kv = args.kv_cache_config
    size = block_bytes(config.num_layers, len(shard.heads.kv), kv.tokens_per_block, config.head_dim, dtype)
    memory = _free_memory(args, config, shard, dtype, device)
    if kv.max_tokens is None:
        num_blocks = memory.share // size
        if num_blocks < 1:
            raise ValueError(
                f"no memory for a KV cache: one block takes {size} bytes, this rank's share is {memory.share}"
            )
        return num_blocks
    num_blocks = -(-kv.max_tokens // kv.tokens_per_block)
    if num_blocks * size > memory.free:
        raise ValueError(
            f"kv_cache_config.max_tokens is {kv.max_tokens}, which takes {num_blocks * size / _GIB:.2f} GiB a rank; "
            f"{memory.free / _GIB:.2f} GiB are free, enough for {memory.free // size * kv.tokens_per_block} tokens"
        )
    return num_blocks


def _free_memory(
    args: TorchLlmArgs, config: ModelConfig, shard: RankShard, dtype: torch.dtype, device: torch.device
) -> _Memory:
    if device.type == "cpu":
        available = psutil.virtual_memory().available
        return _Memory(int(available * args.kv_cache_config.cpu_memory_fraction), available)
    free = torch.cuda.mem_get_info(device)[0] - _activation_bytes(args, config, shard, dtype)
    return _Memory(int(max(0, free) * args.kv_cache_config.free_gpu_memory_fraction), free)


def _activation_bytes(args: TorchLlmArgs, config: ModelConfig, shard: RankShard, dtype: torch.dtype) -> int:
    """One step's temporaries, from above: hidden states, two of the widest products, three of float32 logits."""
    widest = max(2 * len(shard.intermediate), 2 * len(shard.heads.query) * config.head_dim)
    hidden = args.max_num_tokens * (4 * config.hidden_size + 2 * widest) * dtype.itemsize
    return hidden + 3 * args.max_batch_size * config.vocab_size * torch.float32.itemsize
