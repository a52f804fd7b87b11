"""Gangs of executors in one process that exchange KV: ranks are threads, carriers use memory or TCP, with faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tensorweave.cluster.protocol import GenerateRequest, KvSource, SamplingSpec, Ticket, TokenChunk, TokenLogprobs
from tensorweave.cluster.speculation_config import SpeculativeConfig
from tensorweave.workers.engine.device.engine import DeviceEngine
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.scheduler import SimpleScheduler
from tensorweave.workers.fakes.fake_engine import HashEngine
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.gang.report_channel import open_report_channel
from tensorweave.workers.guided.guides import Guides
from tensorweave.workers.kv.manager import KVCacheManager
from tensorweave.workers.sampling.decoder import SamplingDecoder
from tensorweave.workers.speculation.build import build_speculation
from tensorweave.workers.step.layer_marks import LayerMarks
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.carriers.faulty import FaultyCarrier
from tensorweave.workers.transfer.carriers.loop import LoopCarrier, LoopNetwork
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.transfers import KvTransfers
from tensorweave.workers.transfer.transports.direct import DirectTransport
from tensorweave.workers.transfer.window import PoolWindow
from tests.workers.engine_drive import ThreadComm, engine_args
from tests.workers.stepped_engine import SteppedEngine
from tests.workers.waiting import WAIT_S

SECRET = "open sesame"
DEADLINE_S = 10 * WAIT_S
"""Of fetches and leases, where nothing else is said: what is waited for comes without them."""

MakeCarrier = Callable[[PoolWindow, dict[str, str]], Carrier]
ENGINE_KNOBS = ("num_blocks", "tokens_per_block", "max_seq_len")


def tcp_carriers(window: PoolWindow, fingerprint: dict[str, str]) -> Carrier:
    return TcpCarrier(window, fingerprint, "127.0.0.1", SECRET)


def loop_carriers(network: LoopNetwork) -> MakeCarrier:
    return lambda window, fingerprint: LoopCarrier(window, fingerprint, SECRET, network)


class SharedPools:
    """The pools of the ranks of one process, which read each other's as GPUs of one node do. `num_mapped` counts how
    often one was reached. A process of another number does not reach those of this one."""

    def __init__(self) -> None:
        self.windows: list[PoolWindow] = []
        self.num_mapped = 0

    def of_process(self, process: int) -> SharedMemory:
        return SharedMemory(self, process)


@dataclass(frozen=True)
class SharedMemory:
    """Satisfies `PeerMemory`."""

    pools: SharedPools
    process: int

    def share(self, window: PoolWindow) -> dict[str, Any]:
        self.pools.windows.append(window)
        return {"process": self.process, "place": len(self.pools.windows) - 1}

    def map(self, handshake: dict[str, Any], window: PoolWindow) -> Tensor | None:
        if handshake["process"] != self.process:
            return None
        self.pools.num_mapped += 1
        return self.pools.windows[handshake["place"]].blocks_LB2KPH


def peer_carriers(pools: SharedPools, message_bytes: int = 1 << 12) -> MakeCarrier:
    """Receivers read the senders' pools themselves; messages are small, so that there are many."""

    def make(window: PoolWindow, fingerprint: dict[str, str]) -> Carrier:
        transport = DirectTransport(window, message_bytes, pools.of_process(0))
        return TcpCarrier(window, fingerprint, "127.0.0.1", SECRET, [transport])

    return make


def faulty_carriers(make: MakeCarrier, made: list[FaultyCarrier], **plan: Any) -> MakeCarrier:
    def make_one(window: Any, fingerprint: dict[str, str]) -> Carrier:
        carrier = FaultyCarrier(make(window, fingerprint), seed=len(made), **plan)
        made.append(carrier)
        return carrier

    return make_one


class Gang:
    """Executors of one tensor-parallel group. `make_engine(comm)` builds each rank's engine."""

    def __init__(
        self,
        make_engine: Callable[[Comm], Any],
        size: int,
        make_carrier: MakeCarrier | None,
        *,
        name: str = "gang",
        fingerprint: dict[str, str] | None = None,
        max_num_tokens: int = 256,
        chunked: bool = True,
        reuse: bool = True,
        policy: Any = "GUARANTEED_NO_EVICT",
        speculative: SpeculativeConfig | None = None,
        overlaps: bool = False,
        make_guides: Callable[[Comm], Guides] | None = None,
        make_marks: Callable[[Any], LayerMarks] | None = None,
        is_direct: bool = False,
        **transferring: Any,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint or {"version": "test"}
        self.kv_caches: list[KVCacheManager] = []
        self.carriers: list[Carrier] = []
        self.transfers: list[KvTransfers] = []

        def build(comm: Comm) -> PyExecutor:
            torch.set_num_threads(1)
            engine = make_engine(comm)
            info = engine.info
            kv_cache = KVCacheManager(info.num_blocks, info.tokens_per_block, enable_block_reuse=reuse)
            transfers = None
            if make_carrier is not None:
                window = PoolWindow(engine.pool, is_direct=is_direct)
                carrier = make_carrier(window, self.fingerprint)
                transfers = KvTransfers(
                    carrier,
                    window,
                    kv_cache,
                    open_report_channel(comm, "127.0.0.1"),
                    self.fingerprint,
                    comm.rank,
                    comm.size,
                    marks=None if make_marks is None else make_marks(engine),
                    **{"timeout_s": DEADLINE_S, "lease_s": DEADLINE_S, **transferring},
                )
            scheduler = SimpleScheduler(
                kv_cache,
                policy=policy,
                max_num_tokens=max_num_tokens,
                enable_chunked_prefill=chunked,
                counts_on_ends=speculative is None,
            )
            decoder = SamplingDecoder(
                device=engine.pool.cache.device,
                keeps_tokens=isinstance(engine, DeviceEngine),
                vocabulary=engine.vocabulary if isinstance(engine, DeviceEngine) else None,
            )
            speculating = build_speculation(
                speculative,
                decoder,
                comm,
                kv_cache,
                max_num_tokens=max_num_tokens,
                max_samples=max_num_tokens,
                vocab_size=info.vocab_size,
                make_drafter=lambda config: config.drafter,
            )
            executor = PyExecutor(
                engine=engine,
                scheduler=scheduler,
                resources=ResourceManager(
                    [decoder.states, *engine.resource_managers, *speculating.resource_managers, kv_cache]
                ),
                decoder=speculating.decoder,
                speculation=speculating.speculation,
                comm=comm,
                info=info,
                transfers=transfers,
                guides=None if make_guides is None else make_guides(comm),
                disable_overlap_scheduler=not overlaps,
            )
            built[comm.rank] = (executor, kv_cache, transfers)
            return executor

        built: dict[int, Any] = {}
        shared: list[Any] = [None] * size
        barrier = threading.Barrier(size)
        comms: list[Comm] = [SoloComm()] if size == 1 else [ThreadComm(r, shared, barrier) for r in range(size)]
        with ThreadPoolExecutor(size) as pool:
            self.ranks = list(pool.map(build, comms))
        for rank in range(size):
            _, kv_cache, transfers = built[rank]
            self.kv_caches.append(kv_cache)
            if transfers is not None:
                self.transfers.append(transfers)
                self.carriers.append(transfers._carrier)
        for executor in self.ranks:
            executor.start()

    @property
    def leader(self) -> PyExecutor:
        return self.ranks[0]

    @property
    def source(self) -> KvSource:
        endpoints = tuple(rank.kv_endpoint for rank in self.ranks if rank.kv_endpoint is not None)
        return KvSource(self.name, endpoints, self.leader.kv_fingerprint, SECRET)

    def failures(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for transfers in self.transfers:
            for kind, count in transfers.stats.failures().items():
                total[kind] = total.get(kind, 0) + count
        return total

    def gauge(self, name: str) -> float:
        return sum(rank.gauges()[name] for rank in self.ranks)

    def wait_idle(self, timeout_s: float = WAIT_S) -> None:
        """Until no request, lease or fetch is open and all blocks are free on every rank; then the books are right."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            wrong = self._open()
            if not wrong:
                break
            assert time.monotonic() < deadline_s, f"{self.name}: {wrong}"
            time.sleep(0.01)
        for kv_cache in self.kv_caches:
            assert kv_cache.audit() == []

    def _open(self) -> list[str]:
        wrong = [] if not self.leader.num_requests else [f"{self.leader.num_requests} requests"]
        for rank, kv_cache in enumerate(self.kv_caches):
            if kv_cache.available != kv_cache.num_blocks:
                wrong.append(f"rank {rank}: {kv_cache.used} blocks are used")
        for transfers in self.transfers:
            gauges = transfers.gauges()
            wrong += [f"{n}: {gauges[n]}" for n in gauges if gauges[n] and ("open" in n or "held" in n)]
        return wrong

    def close(self) -> None:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            list(pool.map(lambda executor: executor.shutdown(WAIT_S), self.ranks))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hash_gang(size: int = 1, make_carrier: MakeCarrier | None = tcp_carriers, **knobs: Any) -> Gang:
    engine = {name: knobs.pop(name) for name in ENGINE_KNOBS if name in knobs}
    return Gang(lambda comm: HashEngine(**engine), size, make_carrier, **knobs)


def stepped_gang(
    size: int = 1, make_carrier: MakeCarrier | None = tcp_carriers, **knobs: Any
) -> tuple[Gang, list[SteppedEngine]]:
    """A hash gang that stands still until its engines, one a rank, are let go on."""
    engine = {name: knobs.pop(name) for name in ENGINE_KNOBS if name in knobs}
    engines: list[SteppedEngine] = []

    def make_engine(comm: Comm) -> SteppedEngine:
        engines.append(SteppedEngine(**engine))
        return engines[-1]

    return Gang(make_engine, size, make_carrier, **knobs), engines


def model_gang(path: Path, size: int = 1, make_carrier: MakeCarrier | None = tcp_carriers, **knobs: Any) -> Gang:
    kv, on_device = knobs.pop("kv_cache_config", {}), knobs.pop("is_on_device", False)
    device = knobs.pop("device", "cpu")

    def make_engine(comm: Comm) -> Any:
        return load_engine(engine_args(path, kv_cache_config=kv, device=device), comm, is_on_device=on_device)

    return Gang(make_engine, size, make_carrier, **knobs)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0


class Client:
    """Sends requests to gangs and gathers what they answer, by request id."""

    def __init__(self, *gangs: Gang) -> None:
        self.answers: dict[str, Answer] = {}
        self._gangs = gangs

    def take(self, chunks: Sequence[TokenChunk]) -> None:
        for chunk in chunks:
            answer = self.answers.setdefault(chunk.request_id, Answer())
            assert chunk.error is None, chunk.error
            assert chunk.start == len(answer.tokens), "chunks come in order, without gaps"
            answer.tokens += chunk.token_ids
            answer.logprobs += chunk.logprobs
            answer.finish_reason = chunk.finish_reason
            answer.stop_reason = chunk.stop_reason
            answer.num_cached_tokens = chunk.num_cached_tokens

    def wait(self, request_ids: Sequence[str], timeout_s: float = WAIT_S) -> list[Answer]:
        deadline_s = time.monotonic() + timeout_s
        while not all(self._is_over(request_id) for request_id in request_ids):
            assert time.monotonic() < deadline_s, f"hangs: {[r for r in request_ids if not self._is_over(r)][:5]}"
            for gang in self._gangs:
                self.take(gang.leader.await_responses(timeout_s=0.01))
        return [self.answers[request_id] for request_id in request_ids]

    def _is_over(self, request_id: str) -> bool:
        return request_id in self.answers and self.answers[request_id].finish_reason is not None


def request_pair(
    name: str, prompt: Sequence[int], sampling: SamplingSpec, source: KvSource
) -> tuple[GenerateRequest, GenerateRequest]:
    """The prefill and the decode gang's request of one attempt."""
    ticket = f"ticket-{name}"
    return (
        GenerateRequest(f"{name}/p", prompt, sampling, offer=ticket),
        GenerateRequest(f"{name}/d", prompt, sampling, fetch=Ticket(ticket, source)),
    )


def run_disaggregated(
    prefill: Gang, decode: Gang, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingSpec], name: str = "r"
) -> list[Answer]:
    """What the decode gang answers; checks that the prefill gang's first tokens are the same."""
    client = Client(prefill, decode)
    pairs = []
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        for_prefill, for_decode = request_pair(f"{name}{i}", prompt, sampling, prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        decode.leader.enqueue_request(for_decode)
        pairs.append((for_prefill.request_id, for_decode.request_id))
    first = client.wait([pair[0] for pair in pairs])
    answers = client.wait([pair[1] for pair in pairs])
    for one, answer in zip(first, answers, strict=True):
        assert one.tokens == answer.tokens[:1]
    return answers


def run_aggregated(gang: Gang, prompts: Sequence[Sequence[int]], samplings: Sequence[SamplingSpec]) -> list[Answer]:
    client = Client(gang)
    ids = [
        gang.leader.enqueue_request(GenerateRequest(f"a{i}", prompt, sampling))
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    return client.wait(ids)
