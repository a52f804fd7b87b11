"""The engine of an `LLM`: an executor in this process for one rank, a supervised gang on Ray for more. The dispatcher
sees either one as a fleet."""

from __future__ import annotations

import gc
import logging
import secrets
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Protocol

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.fleet import Fleet, StaticFleet, WatchedFleet
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.llm_args import TorchLlmArgs, gang_mesh
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.cluster.process_sentinel import OwnSentinel
from tensorweave.cluster.protocol import KvSource, ModelInfo
from tensorweave.cluster.ray_session import RaySession, start_or_join_ray
from tensorweave.cluster.supervisor_handle import give_logits_processors, stop_supervisor
from tensorweave.cluster.supervisor_start import start_supervisor
from tensorweave.llmapi.loop_thread import LoopThread
from tensorweave.llmapi.sampling_fields import LogitsProcessor
from tensorweave.workers.build import build_executor
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.local import LocalLink
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.rank import RankWorker
from tensorweave.workers.start_log import StartLog
from tensorweave.workers.store.model_store import PinnedModel, pin_model

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 600.0
_SWITCH_INTERVAL_S = 0.0005
"""How long the caller or the event loop, which share the interpreter with the step loop, may keep it waiting each time
that it has waited for a device: 5 ms, Python's own, would leave a GPU without work."""
_JOIN_TIMEOUT_S = 10.0


class Engine(Protocol):
    """`fleet` lives on the LLM's event loop."""

    @property
    def fleet(self) -> Fleet: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def kv_source(self) -> KvSource | None:
        """Where others fetch KV that is computed here; None if `cache_transceiver_config` has no backend."""

    def stats(self, timeout_s: float) -> list[dict[str, Any]]: ...

    def kv_events(self, timeout_s: float) -> list[dict[str, Any]]: ...

    def expect_requests(self, num_requests: int) -> None:
        """So many requests are about to be started together."""

    async def set_logits_processors(self, processors: Mapping[str, LogitsProcessor | None]) -> None:
        """Make every rank hold these, also the ranks of a replacement gang. None removes a processor."""

    def close(self) -> None: ...


def open_engine(args: TorchLlmArgs, loop: LoopThread) -> Engine:
    """Start what `args` ask for. Raises ValueError for wrong arguments, and NotReady if the engine does not come up."""
    return LocalEngine(args, loop) if gang_mesh(args).size == 1 else GangEngine(args, loop)


class LocalEngine:
    """One rank in this process; Ray is not started."""

    def __init__(self, args: TorchLlmArgs, loop: LoopThread) -> None:
        self._loop = loop
        secret = secrets.token_hex(16)
        self.executor: PyExecutor = build_executor(
            args,
            SoloComm(),
            transfer_secret=secret,
            event_buffer_size=args.kv_cache_config.event_buffer_max_size,
            log=StartLog(shows_bars=args.enable_tqdm),
        )
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        # Until the end, collections pass over what a start leaves (modules, weights, graphs): it takes 0.1 s each time.
        gc.collect()
        gc.freeze()
        self.executor.start()
        self.kv_source: KvSource | None = None
        if (endpoint := self.executor.kv_endpoint) is not None:
            gang_id = f"local-{secrets.token_hex(6)}"
            self.kv_source = KvSource(gang_id, (endpoint,), self.executor.kv_fingerprint, secret)
        self._link = loop.call(_open_local(self.executor, self.kv_source))
        self.fleet: Fleet = StaticFleet({"both": [self._link]})

    @property
    def info(self) -> ModelInfo:
        return self.executor.info

    def stats(self, timeout_s: float) -> list[dict[str, Any]]:
        return self.executor.get_latest_iteration_stats()

    def kv_events(self, timeout_s: float) -> list[dict[str, Any]]:
        return self.executor.get_latest_kv_cache_events()

    def expect_requests(self, num_requests: int) -> None:
        self.executor.expect_requests(num_requests)

    async def set_logits_processors(self, processors: Mapping[str, LogitsProcessor | None]) -> None:
        for name, processor in processors.items():
            self.executor.set_logits_processor(name, processor)

    def close(self) -> None:
        self.executor.shutdown()
        self._link.join(_JOIN_TIMEOUT_S)
        self._loop.call(_close_local(self._link))
        gc.unfreeze()


class GangEngine:
    """One gang of several ranks on Ray. A lost gang is replaced."""

    def __init__(self, args: TorchLlmArgs, loop: LoopThread) -> None:
        self._loop = loop
        pinned = pin_model(args.model, revision=args.revision)
        self._ray: RaySession = start_or_join_ray(num_cpus=gang_mesh(args).size)
        with ExitStack() as undo:
            undo.callback(self._ray.close)
            self._ray.warn_if_open()
            wants_gpu = args.device == "cuda" or (args.device == "auto" and self._ray.has_gpus)
            spec = GangSpec(
                mesh=gang_mesh(args),
                args=_gang_args(args, pinned),
                gpus_per_rank=1.0 if wants_gpu else 0.0,
                hang_timeout_s=args.hang_timeout_s,
                model_digest=model_digest(pinned.path, args.load_format),
            )
            self._sentinel = OwnSentinel()
            undo.callback(self._sentinel.end)
            self._supervisor = start_supervisor([PoolSpec("llm", spec)], RankWorker, sentinel=self._sentinel)
            undo.callback(stop_supervisor, self._supervisor)
            self._fleet = loop.call(_open_fleet(self._supervisor), timeout_s=_START_TIMEOUT_S)
            undo.callback(lambda: loop.call(self._fleet.close()))
            [self._link] = self._fleet.links("both")
            undo.pop_all()

    @property
    def fleet(self) -> Fleet:
        return self._fleet

    @property
    def info(self) -> ModelInfo:
        return self._link.info

    @property
    def kv_source(self) -> KvSource | None:
        """That of the current gang; its replacement has another one."""
        return self._loop.call(_kv_source_of(self._fleet))

    def stats(self, timeout_s: float) -> list[dict[str, Any]]:
        return self._loop.call(_stats_of(self._fleet, timeout_s), timeout_s=timeout_s + 5.0)

    def kv_events(self, timeout_s: float) -> list[dict[str, Any]]:
        """The ranks' caches change alike, so rank 0's events stand for all. Those of a replacement gang start over."""
        return self._loop.call(_kv_events_of(self._fleet, timeout_s), timeout_s=timeout_s + 5.0)

    def expect_requests(self, num_requests: int) -> None:
        """They reach the gang as they come."""

    async def set_logits_processors(self, processors: Mapping[str, LogitsProcessor | None]) -> None:
        try:
            await give_logits_processors(self._supervisor, processors)
        except TensorweaveError as error:
            if any(processor is not None for processor in processors.values()):
                raise
            logger.info("logits processors of an ended request stay with the gang: %s", error.message)

    def close(self) -> None:
        try:
            self._loop.call(self._fleet.close())
            stop_supervisor(self._supervisor)
        finally:
            self._sentinel.end()
            self._ray.close()


def _gang_args(args: TorchLlmArgs, pinned: PinnedModel) -> dict[str, Any]:
    """Fields for the ranks: a model name that each rank resolves on its own host, and no tokenizer object. Without the
    tokenizer the ranks cannot read the vocabulary, so they take no guides."""
    of_user = {"batched_logits_processor", "speculative_config"}
    fields = args.model_dump(exclude={"tokenizer", *of_user}, exclude_unset=True)
    fields |= {name: value for name in of_user if (value := getattr(args, name)) is not None}
    if isinstance(args.tokenizer, str | Path):
        fields["tokenizer"] = str(args.tokenizer)
    elif args.tokenizer is not None:
        fields["guided_decoding_backend"] = None
    return {**fields, "model": pinned.name, "revision": pinned.revision}


async def _open_local(executor: PyExecutor, kv_source: KvSource | None) -> LocalLink:
    return LocalLink(executor, kv_source)


async def _close_local(link: LocalLink) -> None:
    link.close()


async def _open_fleet(supervisor: Any) -> WatchedFleet:
    async with AsyncExitStack() as undo:
        fleet = WatchedFleet(supervisor)
        undo.push_async_callback(fleet.close)
        await fleet.wait_ready(_START_TIMEOUT_S)
        undo.pop_all()
    return fleet


async def _kv_source_of(fleet: WatchedFleet) -> KvSource | None:
    links = fleet.links("both")
    return links[0].kv_source if links else None


async def _kv_events_of(fleet: WatchedFleet, timeout_s: float) -> list[dict[str, Any]]:
    return [event for link in fleet.links("both") for event in await link.kv_events(timeout_s)]


async def _stats_of(fleet: WatchedFleet, timeout_s: float) -> list[dict[str, Any]]:
    return [row for link in fleet.links("both") for row in await link.stats(timeout_s)]
