"""Pipeline against tensor parallel over a throttled link: two ranks on CPUs, each in a network namespace of its own.

    python benchmarks/stages_link.py --rate 10gbit --rounds 3 --json out.json

Needs root, iproute2 and two cores. A model of random weights is made, and each mesh answers the same requests in turn,
round after round: one rank (without the link, as the reference of the tokens), two pipeline stages, and two
tensor-parallel ranks. The report has output tokens per second, bytes over the link, and whether the tokens are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from throttled_link import DEVICE, SPACES, ThrottledLink, link_bytes

from tensorweave.cli.figures import publish, report
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.mesh import Mesh, MeshRank
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.build import build_executor
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.gang.comm import SoloComm, start_comm
from tensorweave.workers.gang.rank_store import RankStore
from tensorweave.workers.gang.rendezvous import CallStore, RendezvousStore, call_on_loop

MESHES: Final = {"one rank": Mesh(), "pipeline 2": Mesh(pipeline=2), "tensor 2": Mesh(tensor=2)}
CLONE_NEWNET: Final = 0x40000000
WAIT_S: Final = 300.0


# ---- a rank


def run_rank(rank: int, mesh: Mesh, knobs: dict[str, Any], store_pipe: Connection, pipe: Connection) -> None:
    """Answer lists of requests from `pipe` (rank 0), until it is closed."""
    logging.basicConfig(level=logging.WARNING)
    if mesh.size > 1:
        with Path(f"/run/netns/{SPACES[rank]}").open() as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    comm: Any = SoloComm()
    if mesh.size > 1:
        store = RankStore(_ask_through(store_pipe), timeout_s=WAIT_S)
        # Both ranks are processes of one host here; what two hosts do is what is measured.
        comm = start_comm(MeshRank(rank, mesh), store, torch.device("cpu"), timeout_s=WAIT_S, uses_host_channel=False)
    sizes = {"tensor_parallel_size": mesh.tensor, "pipeline_parallel_size": mesh.pipeline}
    sys.setswitchinterval(0.001)  # as the ranks of a service do
    executor = build_executor(TorchLlmArgs(**knobs, **sizes), comm)
    executor.start()
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            requests = pipe.recv()
            pipe.send(measure(executor, requests))
    with suppress(Exception):  # the other rank may have ended before
        executor.shutdown(5.0)
    os._exit(0)


def measure(executor: PyExecutor, requests: Sequence[GenerateRequest]) -> tuple[float, list[list[int]]]:
    """Seconds, and each request's tokens."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    num_open, began_s = len(requests), time.perf_counter()
    executor.expect_requests(len(requests))
    executor.enqueue_requests(requests)
    while num_open:
        chunks = executor.await_responses(timeout_s=WAIT_S)
        assert chunks, "nothing comes"
        for chunk in chunks:
            assert chunk.error is None, chunk.error
            tokens[chunk.request_id] += chunk.token_ids
            num_open -= chunk.is_last
    return time.perf_counter() - began_s, list(tokens.values())


def _ask_through(pipe: Connection) -> CallStore:
    lock = threading.Lock()

    def ask(verb: str, *arguments: Any) -> Any:
        with lock:
            pipe.send((verb, arguments))
            return pipe.recv()

    return ask


# ---- the gangs


class Gang:
    """The ranks of one mesh as processes."""

    def __init__(self, mesh: Mesh, knobs: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        context = multiprocessing.get_context("spawn")
        ask = call_on_loop(RendezvousStore(), loop, WAIT_S)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(mesh.size):
            store, their_store = context.Pipe()
            ours, theirs = context.Pipe()
            arguments = (rank, mesh, knobs, their_store, theirs)
            self._processes.append(context.Process(target=run_rank, args=arguments, daemon=True))
            self._processes[-1].start()
            self._pipes.append(ours)
            for end in (their_store, theirs):
                end.close()
            threading.Thread(target=_serve_store, args=(store, ask), daemon=True).start()
        for pipe in self._pipes:
            self._receive(pipe)

    def answer(self, requests: Sequence[GenerateRequest]) -> tuple[float, list[list[int]]]:
        """Seconds, and each request's tokens."""
        self._pipes[0].send(requests)
        seconds, tokens = self._receive(self._pipes[0])
        return seconds, tokens

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)
            process.kill()

    def _receive(self, pipe: Connection) -> Any:
        if not pipe.poll(WAIT_S):
            raise TimeoutError("a rank does not answer")
        return pipe.recv()


def _serve_store(pipe: Connection, ask: CallStore) -> None:
    with suppress(EOFError, OSError), pipe:
        while True:
            verb, arguments = pipe.recv()
            pipe.send(ask(verb, *arguments))


def make_requests(args: argparse.Namespace, number: int) -> list[GenerateRequest]:
    rng = random.Random(number)
    spec = SamplingSpec(args.output_tokens)
    prompts = [[rng.randrange(args.vocab_size) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]
    return [GenerateRequest(f"{number}-{i}", prompt, spec) for i, prompt in enumerate(prompts)]


def write_model(path: Path, args: argparse.Namespace) -> None:
    """A Llama's configuration; its weights are drawn by load_format 'dummy'."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden_size,
        "intermediate_size": 3 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64,
        "num_key_value_heads": max(2, args.hidden_size // 256),
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": args.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")


@dataclass
class Runs:
    """What one gang has answered, round by round."""

    seconds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    num_bytes: int = 0

    def row(self, args: argparse.Namespace, expected: Sequence[list[int]]) -> dict[str, Any]:
        num_tokens = args.requests * args.output_tokens
        num_alike = sum(got == want for got, want in zip(self.answers, expected, strict=True))
        return {
            "tokens_per_s": [round(num_tokens / each, 1) for each in self.seconds],
            "median_tokens_per_s": round(num_tokens / statistics.median(self.seconds), 1),
            "link_mb_per_round": round(self.num_bytes / args.rounds / 1e6, 2),
            "equal_answers": f"{num_alike} of {len(expected)}",
        }


def compare(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    kv = {"max_tokens": 2 * args.requests * (args.prompt_tokens + args.output_tokens), "enable_block_reuse": False}
    knobs = {"model": model, "load_format": "dummy", "device": "cpu", "dtype": "float32", "num_threads": 1}
    knobs |= {"kv_cache_config": kv, "guided_decoding_backend": None, "max_num_tokens": args.max_num_tokens}
    runs = {name: Runs() for name in MESHES}
    with ExitStack() as undo:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        gangs = {name: Gang(mesh, knobs, loop) for name, mesh in MESHES.items()}
        for gang in gangs.values():
            undo.callback(gang.close)
        for gang in gangs.values():
            gang.answer(make_requests(args, 0))
        for number in range(1, args.rounds + 1):
            for name, gang in list(gangs.items())[:: 1 if number % 2 else -1]:
                before = link_bytes()
                took_s, tokens = gang.answer(make_requests(args, number))
                runs[name].num_bytes += link_bytes() - before
                runs[name].seconds.append(took_s)
                runs[name].answers += tokens
    rows: dict[str, Any] = {name: each.row(args, runs["one rank"].answers) for name, each in runs.items()}
    pipeline, tensor = (rows[name]["median_tokens_per_s"] for name in ("pipeline 2", "tensor 2"))
    return {**rows, "pipeline over tensor": round(pipeline / tensor, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="10gbit", help="of the link, as tc writes it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="in flight at once")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--max-num-tokens", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ThrottledLink(args.rate):
        write_model(Path(scratch), args)
        rows = compare(args, Path(scratch))
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    publish(report("stages_link", settings, rows), args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
