"""Gangs of executors with adapters, in this process: ranks are threads, all else is what a service runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.protocol import GenerateRequest, KvSource, SamplingSpec, Ticket, TokenChunk
from tensorweave.workers.build import build_executor
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.lora.peft_directory import PeftFiles
from tests.workers.engine_drive import engine_args
from tests.workers.stage_gang import thread_comms
from tests.workers.waiting import WAIT_S

SECRET = "open sesame"


def adapter_at(path: Path, name: str = "adapter") -> Adapter:
    return Adapter(name, PeftFiles.read(path).digest, str(path))


class AdapterGang:
    def __init__(self, path: Path, size: int = 1, num_stages: int = 1, **knobs: Any) -> None:
        sizes = {"tensor_parallel_size": size, "pipeline_parallel_size": num_stages}
        args = engine_args(path, enable_lora=True, guided_decoding_backend=None, **sizes, **knobs)

        def build(comm: Comm) -> PyExecutor:
            torch.set_num_threads(1)
            return build_executor(args, comm, transfer_secret=SECRET)

        comms = thread_comms(Mesh(tensor=size, pipeline=num_stages))
        with ThreadPoolExecutor(len(comms)) as pool:
            self.ranks = list(pool.map(build, comms))
        for rank in self.ranks:
            rank.start()
        self._numbers = itertools.count()
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.errors: dict[str, TensorweaveError] = {}
        self._ended: set[str] = set()

    @property
    def leader(self) -> PyExecutor:
        return self.ranks[0]

    @property
    def source(self) -> KvSource:
        endpoints = tuple(rank.kv_endpoint for rank in self.ranks if rank.kv_endpoint is not None)
        return KvSource("gang", endpoints, self.leader.kv_fingerprint, SECRET)

    def ask(self, prompt: Sequence[int], adapter: Adapter | None, num_tokens: int = 8, **fields: Any) -> str:
        fields = {"sampling": SamplingSpec(num_tokens), **fields}
        name = f"r{next(self._numbers)}"
        return self.leader.enqueue_request(GenerateRequest(name, prompt, adapter=adapter, **fields))

    def wait(self, names: Sequence[str]) -> list[list[int]]:
        """The tokens of these requests. Raises the error of one that has ended with one."""
        deadline_s = time.monotonic() + WAIT_S
        while not self._ended.issuperset(names):
            assert time.monotonic() < deadline_s, f"hangs: {set(names) - self._ended}"
            for chunk in self.leader.await_responses(timeout_s=0.05):
                self._take(chunk)
        for name in names:
            if name in self.errors:
                raise self.errors[name]
        return [self.tokens[name] for name in names]

    def answer(self, prompt: Sequence[int], adapter: Adapter | None, num_tokens: int = 8, **fields: Any) -> list[int]:
        [tokens] = self.wait([self.ask(prompt, adapter, num_tokens, **fields)])
        return tokens

    def gauges(self) -> Mapping[str, float]:
        return self.leader.gauges()

    def _take(self, chunk: TokenChunk) -> None:
        self.tokens.setdefault(chunk.request_id, []).extend(chunk.token_ids)
        self.cached[chunk.request_id] = chunk.num_cached_tokens
        if chunk.error is not None:
            self.errors[chunk.request_id] = chunk.error
        if chunk.is_last:
            self._ended.add(chunk.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            list(pool.map(lambda rank: rank.shutdown(WAIT_S), self.ranks))


def answer_apart(prefill: AdapterGang, decode: AdapterGang, name: str, prompt: Sequence[int], adapter: Any) -> str:
    """Begin a request in two phases; return the name of the second."""
    ticket = f"ticket-{name}"
    prefill.ask(prompt, adapter, offer=ticket)
    return decode.ask(prompt, adapter, fetch=Ticket(ticket, prefill.source))
