"""From `TorchLlmArgs` to an `AutodeployEngine`: the model is built, its layers are recorded, it gets a KV pool, and its
logits are compared once with those of transformers' own attention."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import ModelInfo
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.kernels.attention.backend import Span
from tensorweave.workers.autodeploy.attention import IMPLEMENTATION, Layer, Survey, attending
from tensorweave.workers.autodeploy.causal_lm import CausalLmConfig, load_causal_lm, read_causal_lm_config
from tensorweave.workers.autodeploy.engine import AutodeployEngine
from tensorweave.workers.engine.kv_pool import KVPool, block_bytes
from tensorweave.workers.engine.memory_need import MemoryNeed, check_memory, checkpoint_bytes
from tensorweave.workers.engine.packing import PackedBatch
from tensorweave.workers.engine.pool_size import count_blocks
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.device import pick_device, pick_dtype
from tensorweave.workers.models.checkpoint import SafetensorsDirectory
from tensorweave.workers.models.generation_config import (
    load_generation_config,
    load_sampling_defaults,
    unite_end_ids,
)
from tensorweave.workers.store.model_store import resolve_model

_TRIAL_TOKENS: Final = (41, 7)
_TRIAL_BLOCK: Final = 8
# As a fraction of the logits' norm. A wrong position, mask or scale gives about 1.
_TRIAL_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}


def load_autodeploy(args: TorchLlmArgs, comm: Comm) -> AutodeployEngine:
    """Load `args.model` on one rank.

    Raises:
        ValueError: the model does not run on this backend, or its files or the arguments are wrong.
    """
    if comm.size > 1:
        raise ValueError(f"tensor_parallel_size is {comm.size}; backend '_autodeploy' runs on one rank")
    path = resolve_model(args.model, revision=args.revision)
    config = read_causal_lm_config(path)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, config.checkpoint_dtype, device)
    if device.type == "cpu":
        torch.set_num_threads(args.num_threads or len(os.sched_getaffinity(0)))
    _check_weights(path, args, dtype, device)
    model = load_causal_lm(path, config, args.load_format, dtype, device)
    layers, vocab_size = _survey(model, config, device)
    pool = _make_pool(args, layers, vocab_size, dtype, device)
    P = pool.tokens_per_block
    info = ModelInfo(
        model=str(args.model),
        vocab_size=vocab_size,
        max_seq_len=min(config.max_seq_len(args.max_seq_len), pool.num_blocks * P),
        dtype=str(dtype).removeprefix("torch."),
        tokens_per_block=P,
        num_blocks=pool.num_blocks,
        end_ids=unite_end_ids(vocab_size, config.end_ids, load_generation_config(path).end_ids),
        sampling_defaults=load_sampling_defaults(path, args.generation_config),
    )
    _try_out(model, config, layers, info, dtype, device)
    return AutodeployEngine(model, layers, pool, info, has_plain_attention=args.attn_backend == "VANILLA")


def _check_weights(path: Path, args: TorchLlmArgs, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError if they do not fit in memory. For a model without safetensors nothing is known yet."""
    if args.load_format == "dummy" or not any(path.glob("*.safetensors")):
        return
    with SafetensorsDirectory(path) as source:
        weights_bytes = checkpoint_bytes(source.shapes, dtype)
    check_memory(MemoryNeed(weights_bytes, 0), device, num_ranks_here=1)


def _survey(model: Any, config: CausalLmConfig, device: torch.device) -> tuple[tuple[Layer, ...], int]:
    """Return the layers, and the size of the vocabulary according to the logits."""
    survey, one = Survey(config.name), torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad(), attending(survey):
        logits = model(input_ids=one, position_ids=one, use_cache=False).logits
    layers = survey.layers(config.text.num_hidden_layers)
    _check_kinds(config, layers)
    return layers, logits.shape[-1]


def _check_kinds(config: CausalLmConfig, layers: tuple[Layer, ...]) -> None:
    kinds = getattr(config.text, "layer_types", None) or []
    for kind, layer in zip(kinds, layers, strict=False):
        if (kind == "sliding_attention") != (layer.window is not None):
            raise ValueError(f"{config.name}: layer_types says {kind} of a layer whose window is {layer.window}")


def _make_pool(
    args: TorchLlmArgs, layers: tuple[Layer, ...], vocab_size: int, dtype: torch.dtype, device: torch.device
) -> KVPool:
    kv, K, H = args.kv_cache_config, layers[0].num_kv_heads, layers[0].head_dim
    widest = max(layer.num_heads for layer in layers) * H
    most = StepSettings.of(args, device.type)
    activations = 16 * most.max_num_tokens * widest * dtype.itemsize + 12 * most.max_batch_size * vocab_size
    size = block_bytes(len(layers), K, kv.tokens_per_block, H, dtype)
    num_blocks = count_blocks(kv, size, device, activations)
    return KVPool(len(layers), num_blocks, K, kv.tokens_per_block, H, dtype, device)


def _try_out(
    model: Any,
    config: CausalLmConfig,
    layers: tuple[Layer, ...],
    info: ModelInfo,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compute two prompts in one batch, one of them in two chunks. Raises ValueError unless the logits are those of
    transformers' own attention.

    This finds what no configuration tells: models that ignore positions, or that mix tokens other than by attention.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, info.max_seq_len) for length in _TRIAL_TOKENS]
    first, second = (torch.randint(info.vocab_size, (length,), generator=generator).tolist() for length in lengths)
    per_prompt = -(-max(lengths) // _TRIAL_BLOCK)
    pool = KVPool(len(layers), 2 * per_prompt, layers[0].num_kv_heads, _TRIAL_BLOCK, layers[0].head_dim, dtype, device)
    engine = AutodeployEngine(model, layers, pool, info)
    half = len(first) // 2
    tables = list(range(0, 2 * per_prompt, 2)), list(range(1, 2 * per_prompt, 2))
    engine.compute(_batch([(first[:half], 0, tables[0])]), [0])
    ours = engine.compute(
        _batch([(first[half:], half, tables[0]), (second, 0, tables[1])]),
        [len(first) - half - 1, len(first) - half + len(second) - 1],
    )
    theirs = torch.stack([_their_logits(model, prompt, device) for prompt in (first, second)])
    error = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()
    if not error <= _TRIAL_TOLERANCE[dtype]:
        raise ValueError(
            f"backend '_autodeploy' cannot run {config.name}: over paged attention its logits are {error:.2g} of their "
            f"size away from those of transformers' own"
        )


def _batch(parts: list[tuple[list[int], int, list[int]]]) -> PackedBatch:
    """`parts` are (tokens, first position, blocks)."""
    packed = PackedBatch()
    for tokens, start, blocks in parts:
        positions = range(start, start + len(tokens))
        packed.spans.append(Span(len(packed.token_ids), len(tokens), start, blocks))
        packed.token_ids += tokens
        packed.positions += positions
        packed.slots += [blocks[i // _TRIAL_BLOCK] * _TRIAL_BLOCK + i % _TRIAL_BLOCK for i in positions]
    return packed


def _their_logits(model: Any, prompt: list[int], device: torch.device) -> Tensor:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    return logits[0, -1].to(torch.float32)
