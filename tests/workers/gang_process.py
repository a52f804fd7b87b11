"""Gangs of one rank in processes of their own, each on a GPU of its own, that can be killed."""

from __future__ import annotations

import functools
import logging
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tensorweave.cluster.protocol import GenerateRequest, KvSource, LinkMeasurement, SamplingSpec
from tensorweave.workers.build_transfers import follow_layers
from tensorweave.workers.engine.load import load_engine
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.carriers.faulty import FaultyCarrier
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.transports.selection import DIRECT_BACKEND, make_transports
from tensorweave.workers.transfer.window import PoolWindow
from tests.workers.engine_drive import engine_args
from tests.workers.transfer_drive import SECRET, Client, Gang, request_pair

START_S = 120.0
ANSWER_S = 120.0

Tokens = tuple[list[int], str | None]


class GangProcess:
    """`gpu` is the number of its GPU, the only one that it sees; None runs it on the CPU."""

    def __init__(self, path: Path, backend: str, gpu: int | None, name: str, **knobs: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        knobs = {"device": "cpu" if gpu is None else "cuda", **knobs}
        self.process = context.Process(target=_serve, args=(theirs, path, backend, name, knobs), daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "" if gpu is None else str(gpu))
            patch.setenv("NCCL_SOCKET_IFNAME", "lo")
            self.process.start()
        theirs.close()

    @functools.cached_property
    def source(self) -> KvSource:
        """Waits until it has started."""
        source: KvSource = self._answer(START_S)
        return source

    def add(self, requests: Sequence[GenerateRequest]) -> None:
        assert self.source
        self._pipe.send(("add", list(requests)))

    def wait(self, request_ids: Sequence[str]) -> list[Tokens]:
        answers: list[Tokens] = self._ask("wait", list(request_ids))
        return answers

    def wait_idle(self) -> None:
        self._ask("wait_idle")

    def gauges(self) -> dict[str, float]:
        gauges: dict[str, float] = self._ask("gauges")
        return gauges

    def measure_link(self, source: KvSource) -> LinkMeasurement:
        link: LinkMeasurement = self._ask("measure_link", source)
        return link

    def kill(self) -> None:
        self.process.kill()
        self.process.join(START_S)

    def _ask(self, verb: str, *arguments: Any) -> Any:
        assert self.source
        self._pipe.send((verb, *arguments))
        return self._answer(ANSWER_S)

    def _answer(self, timeout_s: float) -> Any:
        assert self._pipe.poll(timeout_s), "hangs"
        is_right, answer = self._pipe.recv()
        assert is_right, answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.is_alive() and error is None:
            self._ask("close")
            self.process.join(ANSWER_S)
        self.kill()


def run_pair(
    prefill: GangProcess,
    decode: GangProcess,
    prompts: Sequence[list[int]],
    samplings: Sequence[SamplingSpec],
    name: str,
) -> list[Tokens]:
    """What the decode gang answers."""
    return decode.wait(start_pair(prefill, decode, prompts, samplings, name))


def start_pair(
    prefill: GangProcess,
    decode: GangProcess,
    prompts: Sequence[list[int]],
    samplings: Sequence[SamplingSpec],
    name: str,
) -> list[str]:
    pairs = [
        request_pair(f"{name}{i}", prompt, sampling, prefill.source)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    prefill.add([pair[0] for pair in pairs])
    decode.add([pair[1] for pair in pairs])
    return [pair[1].request_id for pair in pairs]


def run_alone(gang: GangProcess, prompts: Sequence[list[int]], samplings: Sequence[SamplingSpec]) -> list[Tokens]:
    requests = [GenerateRequest(f"a{i}", p, s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))]
    gang.add(requests)
    return gang.wait([request.request_id for request in requests])


def _serve(pipe: Connection, path: Path, backend: str, name: str, knobs: dict[str, Any]) -> None:
    faults, rate = knobs.pop("faults", ()), 0.3

    def make_carrier(window: PoolWindow, alike: dict[str, str]) -> Carrier:
        carrier = TcpCarrier(window, alike, "127.0.0.1", SECRET, make_transports(backend, window))
        return FaultyCarrier(carrier, 1, rate, faults) if faults else carrier

    logging.basicConfig(level=logging.INFO, format=f"%(relativeCreated)d {name} %(name)s: %(message)s")
    args = engine_args(path, device=knobs.pop("device"), kv_cache_config=knobs.pop("kv_cache_config", {}))
    direct: dict[str, Any] = {"make_marks": follow_layers, "is_direct": True} if backend == DIRECT_BACKEND else {}
    with Gang(lambda comm: load_engine(args, comm), 1, make_carrier, name=name, **direct, **knobs) as gang:
        pipe.send((True, gang.source))
        client = Client(gang)
        while True:
            verb, *arguments = pipe.recv()
            if verb == "close":
                break
            try:
                answer = _obey(gang, client, verb, arguments)
            except AssertionError as error:
                pipe.send((False, str(error)))
            else:
                if verb != "add":
                    pipe.send((True, answer))
    pipe.send((True, None))


def _obey(gang: Gang, client: Client, verb: str, arguments: list[Any]) -> Any:
    match verb, arguments:
        case "add", [requests]:
            for request in requests:
                gang.leader.enqueue_request(request)
            return None
        case "wait", [ids]:
            return [(answer.tokens, answer.finish_reason) for answer in client.wait(ids)]
        case "wait_idle", []:
            return gang.wait_idle()
        case "gauges", []:
            return gang.leader.gauges()
        case "measure_link", [source]:
            return gang.transfers[0].measure_link(source, timeout_s=30.0)
    raise AssertionError(f"no verb {verb!r}")
