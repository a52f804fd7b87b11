"""Builds an executor from `TorchLlmArgs`: engine, KV manager, schedulers and decoder put together. Called by ranks and
by the LLM class."""

from __future__ import annotations

import importlib
from typing import Any

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.workers.comm import Comm
from tensorweave.workers.decoder import SamplingDecoder
from tensorweave.workers.engine_loader import load_engine
from tensorweave.workers.executor import PyExecutor
from tensorweave.workers.kv_cache import KVCacheManager
from tensorweave.workers.resources import ResourceManager
from tensorweave.workers.scheduler import SimpleScheduler


def build_executor(args: TorchLlmArgs, comm: Comm) -> PyExecutor:
    """Load this rank's share of the model and put the executor around it; not started.

    Raises:
        ValueError: the arguments or the model's files are wrong; the message names what.
    """
    engine = load_engine(args, comm)
    info = engine.info
    kv_class = _load_class(args.kv_cache_manager, "kv_cache_manager", KVCacheManager)
    kv_cache = kv_class(
        num_blocks=info.num_blocks,
        tokens_per_block=info.tokens_per_block,
        enable_block_reuse=args.kv_cache_config.enable_block_reuse,
        enable_partial_reuse=args.kv_cache_config.enable_partial_reuse,
    )
    scheduler_class = _load_class(args.scheduler, "scheduler", SimpleScheduler)
    scheduler = scheduler_class(
        kv_cache,
        policy=args.scheduler_config.capacity_scheduler_policy,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        enable_chunked_prefill=args.enable_chunked_prefill,
        chunking_policy=args.scheduler_config.context_chunking_policy,
    )
    return PyExecutor(
        engine=engine,
        scheduler=scheduler,
        resources=ResourceManager([kv_cache]),
        decoder=SamplingDecoder(),
        comm=comm,
        info=info,
        max_requests=args.max_queued_requests,
        max_stats=args.iter_stats_max_iterations,
    )


def _load_class(path: str | None, knob: str, default: type[Any]) -> type[Any]:
    """The class at 'package.module:Class', or the default where no path is given."""
    if path is None:
        return default
    module_name, _, class_name = path.partition(":")
    if not class_name:
        raise ValueError(f"{knob} is {path!r}, must look like 'package.module:Class'")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{knob} {path!r} cannot be loaded: {error}") from None
    if not isinstance(found, type):
        raise ValueError(f"{knob} {path!r} is not a class")
    return found
