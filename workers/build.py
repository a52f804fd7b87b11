"""Builds an executor from `TorchLlmArgs`: engine, KV manager, scheduler, decoder and KV transfers.

Called by the ranks of a gang and by the LLM class.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
from typing import Any

from tensorweave.cluster.llm_args import TorchLlmArgs, adapter_config, gang_mesh, kv_cache_dtype
from tensorweave.cluster.lora_config import most_in_memory, most_in_step
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.protocol import ModelInfo
from tensorweave.cluster.quant_config import weight_quantization
from tensorweave.cluster.speculation_config import UserProvidedDecodingConfig
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.cluster.tls import TlsFiles
from tensorweave.workers.build_transfers import make_transfers
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.device_memory import naming_knobs
from tensorweave.workers.engine.engine import ModelEngine, PyTorchModelEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.engine_dir.directory import check_fit
from tensorweave.workers.engine_dir.manifest import EngineManifest, saved_quantization
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.iteration_stats import step_limits
from tensorweave.workers.executor.prompt_share import BalancedShare, FixedShare, PromptShare
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.executor.stage_decoder import stage_decoder
from tensorweave.workers.executor.turns import make_turns
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.gang.device import pick_device
from tensorweave.workers.gang.report_channel import open_report_channel
from tensorweave.workers.guided.guides import Guides, NoGuides, RankGuides
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.guided.vocabulary import TokenizerSource
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.lora.adapters import Adapters, NoAdapters, RankAdapters
from tensorweave.workers.lora.scheduling import AdapterLimitedScheduler
from tensorweave.workers.models.assembly import weights_per_layer
from tensorweave.workers.models.checkpoint import refuse_adapters
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.generation_config import load_sampling_defaults
from tensorweave.workers.sampling.decoder import Decoder, SamplingDecoder
from tensorweave.workers.speculation.build import build_speculation
from tensorweave.workers.start_log import StartLog
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.store.model_store import resolve_model


def build_executor(
    args: TorchLlmArgs,
    comm: Comm,
    *,
    transfer_host: str = "127.0.0.1",
    transfer_secret: str = "",
    transfer_tls: TlsFiles | None = None,
    num_ranks_here: int = 1,
    event_buffer_size: int = 0,
    loads_guides_early: bool = False,
    log: StartLog | None = None,
) -> PyExecutor:
    """Load this rank's share of the model and build the executor around it; it is not started.

    Args:
        transfer_host: the address of this rank's host from which other gangs fetch KV, if `args` asks for transfers.
        transfer_secret: what other gangs must send to this gang's KV endpoints; the same on all its ranks.
        transfer_tls: with it, KV that other gangs fetch or send is encrypted.
        num_ranks_here: ranks of this gang that share this host's memory.
        event_buffer_size: KV events that are kept until they are read.
        loads_guides_early: what the first grammar needs is started with the executor, and not when that comes.
        log: told of each part of the start.

    With `args.cache_transceiver_config` set, `executor.kv_endpoint` is the address from which this rank's KV is
    fetched, and `executor.kv_fingerprint` what the fetching gang must have in common with this one. A gang's `KvSource`
    is made of them, in rank order.

    Raises:
        ValueError: the arguments or the model's files are wrong; the message names which.
    """
    log = log or StartLog()
    device_type = pick_device(args.device).type
    settings = StepSettings.of(args, device_type)
    if args.speculative_config is not None and device_type != "cpu":
        raise ValueError(
            "speculative_config is for CPUs so far: a GPU's steps keep their tokens on the device. Leave it out, or "
            "set device to 'cpu'"
        )
    engine = _load_engine(args, comm, num_ranks_here, log)
    kv_cache = _make_kv_cache(args, engine.info, event_buffer_size)
    scheduler = _make_scheduler(args, settings, kv_cache, comm.place.mesh)
    gc.set_threshold(args.garbage_collection_gen0_threshold, *gc.get_threshold()[1:])
    decoder = _make_decoder(engine, log)
    speculating = build_speculation(
        args.speculative_config,
        decoder,
        comm,
        kv_cache,
        max_num_tokens=settings.max_num_tokens,
        max_samples=settings.max_samples,
        vocab_size=engine.info.vocab_size,
        make_drafter=_make_drafter,
        on_gpu=device_type == "cuda",
    )
    adapters = _make_adapters(args, engine, comm, transfer_host)
    executor = PyExecutor(
        engine=engine,
        scheduler=scheduler,
        resources=ResourceManager(
            [decoder.states, *engine.resource_managers, *speculating.resource_managers, *adapters.managers, kv_cache]
        ),
        decoder=_across_stages(speculating.decoder, comm),
        speculation=speculating.speculation,
        comm=comm,
        info=dataclasses.replace(engine.info, guided_decoding_backend=args.guided_decoding_backend),
        guides=_make_guides(args, engine, comm, transfer_host, loads_early=loads_guides_early),
        adapters=adapters,
        transfers=make_transfers(args, engine, kv_cache, comm, transfer_host, transfer_secret, transfer_tls),
        disable_overlap_scheduler=not settings.overlaps,
        max_requests=args.max_queued_requests,
        max_stats=args.iter_stats_max_iterations if args.enable_iter_perf_stats else 0,
        stats_limits=step_limits(args.max_queued_requests, settings.max_batch_size, settings.max_num_tokens),
    )
    executor.set_batched_logits_processor(args.batched_logits_processor)
    return executor


def _make_kv_cache(args: TorchLlmArgs, info: ModelInfo, event_buffer_size: int) -> Any:
    """A KV cache manager: ours, or of the user's class, which takes the same arguments."""
    kv_class = _load_class(args.kv_cache_manager, "kv_cache_manager", KVCacheManager)
    return kv_class(
        num_blocks=info.num_blocks,
        tokens_per_block=info.tokens_per_block,
        enable_block_reuse=args.kv_cache_config.enable_block_reuse,
        enable_partial_reuse=args.kv_cache_config.enable_partial_reuse,
        event_buffer_max_size=event_buffer_size,
    )


def _make_decoder(engine: ModelEngine, log: StartLog) -> SamplingDecoder:
    device = engine.pool.cache.device
    if not isinstance(engine, DeviceEngine):
        return SamplingDecoder(device=device)
    decoder = SamplingDecoder(device=device, keeps_tokens=True, vocabulary=engine.vocabulary)
    with log.part("warming up sampling"), naming_knobs("sampling", "kv_cache_config.free_gpu_memory_fraction"):
        decoder.warm_up(engine.blank_steps())
    return decoder


def _across_stages(decoder: Decoder, comm: Comm) -> Decoder:
    place = comm.place
    return decoder if place.mesh.pipeline == 1 else stage_decoder(decoder, comm.stages, is_last=place.is_last_stage)


def _make_scheduler(args: TorchLlmArgs, settings: StepSettings, kv_cache: Any, mesh: Mesh) -> Any:
    """A scheduler: ours, or of the user's class, which takes the same arguments."""
    scheduler_class = _load_class(args.scheduler, "scheduler", SimpleScheduler)
    own = {
        "share": _prompt_share(args, settings, kv_cache),
        "counts_on_ends": args.speculative_config is None and mesh.pipeline == 1,
        "turns": make_turns(mesh, overlaps=settings.overlaps),
    }
    scheduler = scheduler_class(
        kv_cache,
        policy=args.scheduler_config.capacity_scheduler_policy,
        max_batch_size=settings.max_batch_size,
        max_num_tokens=settings.max_num_tokens,
        enable_chunked_prefill=args.enable_chunked_prefill,
        chunking_policy=args.scheduler_config.context_chunking_policy,
        **(own if scheduler_class is SimpleScheduler else {}),
    )
    adapters = adapter_config(args)
    return scheduler if adapters is None else AdapterLimitedScheduler(scheduler, most_in_step(adapters))


def _prompt_share(args: TorchLlmArgs, settings: StepSettings, kv_cache: Any) -> PromptShare:
    """`BalancedShare` was made from step times of 16-bit weights and KV. With FP8, 2,048 tokens were faster (1k/1k:
    15,262 against 13,043 tok/s); the cause is probably mended (benchmarks/log.md), but has not been run on a card."""
    most = settings.max_prompt_tokens_beside_decodes
    if not settings.balances_prompts or kv_cache_dtype(args) != "auto" or args.backend == "_autodeploy":
        return FixedShare(most)
    path = resolve_model(args.model, revision=args.revision)
    if (weight_quantization(args.quant_config) or saved_quantization(path, args.load_format)) is not None:
        return FixedShare(most)
    return BalancedShare(kv_cache, most, weights_per_layer(load_model_config(path), gang_mesh(args)))


def _make_guides(args: TorchLlmArgs, engine: ModelEngine, comm: Comm, host: str, *, loads_early: bool) -> Guides:
    if args.guided_decoding_backend is None:
        return NoGuides()
    source = TokenizerSource.of(
        args.tokenizer,
        str(resolve_model(args.model, revision=args.revision)),
        args.tokenizer_revision,
        args.trust_remote_code,
        args.tokenizer_mode != "slow",
    )
    trials = Trials(source, engine.info.vocab_size)
    reports, device = open_report_channel(comm, host), engine.pool.cache.device
    return RankGuides(comm.rank, comm.size, trials, reports, device, loads_early=loads_early)


def _make_adapters(args: TorchLlmArgs, engine: ModelEngine, comm: Comm, host: str) -> Adapters:
    config = adapter_config(args)
    if config is None:
        return NoAdapters()
    assert isinstance(engine, PyTorchModelEngine)
    assert engine.adapter_reader is not None
    reports = open_report_channel(comm, host)
    return RankAdapters(comm.rank, comm.size, most_in_memory(config), engine.adapter_reader, reports)


def check_model(args: TorchLlmArgs) -> None:
    """Raises ValueError if the model's configuration shows that it cannot run. Its weights are not read."""
    path = resolve_model(args.model, revision=args.revision)
    load_sampling_defaults(path, args.generation_config)
    refuse_adapters(path)
    if args.backend == "_autodeploy":
        from tensorweave.workers.autodeploy.causal_lm import read_causal_lm_config

        read_causal_lm_config(path)
        return
    load_model_config(path)
    saved = None if args.load_format == "dummy" else EngineManifest.read(path)
    if saved is not None:
        check_fit(saved, path, gang_mesh(args), args.dtype, weight_quantization(args.quant_config))


def _load_engine(args: TorchLlmArgs, comm: Comm, num_ranks_here: int, log: StartLog) -> ModelEngine:
    if args.backend == "_autodeploy":
        from tensorweave.workers.autodeploy.loader import load_autodeploy  # imports transformers, which takes seconds

        return load_autodeploy(args, comm)
    return load_engine(args, comm, num_ranks_here, log)


def _make_drafter(config: UserProvidedDecodingConfig) -> Any:
    """The user's object, or one of the user's class."""
    if not isinstance(config.drafter, str):
        return config.drafter
    return _load_class(config.drafter, "speculative_config.drafter", object)(config)


def _load_class(path: str | None, knob: str, default: type[Any]) -> type[Any]:
    """The class at 'package.module:Class', or the default if no path is given."""
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
