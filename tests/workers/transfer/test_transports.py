"""Which transport payloads take: those of two ranks, the choice between them, and one whose payloads are names."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorweave.cli import bench_transfer_sockets
from tensorweave.cli.bench_transfer_fetches import Shape, bench_fetches, bench_kernels
from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.blocks.pack import pack_blocks
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.transfer.carrier import Carrier, Claim
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.transports.frame_connection import Stream, _call, tensor_bytes
from tensorweave.workers.transfer.transports.same_node import NameLoader
from tensorweave.workers.transfer.transports.selection import make_transports
from tensorweave.workers.transfer.transports.transport import HostTransport, TransportKind
from tensorweave.workers.transfer.window import PoolWindow
from tests.workers.engine_drive import random_prompts
from tests.workers.transfer_drive import DEADLINE_S, SECRET, MakeCarrier, hash_gang, run_aggregated, run_disaggregated
from tests.workers.waiting import WAIT_S, wait_until

PROMPTS = random_prompts(8, 90, vocab=500)
SAMPLINGS = [SamplingSpec(max_tokens=5) for _ in PROMPTS]


class Board:
    """Where ranks of one process find each other's pools, as GPUs of one node do. `num_arrived` counts payloads."""

    def __init__(self) -> None:
        self.windows: list[PoolWindow] = []
        self.num_arrived = 0


class BoardTransport:
    """A `TransportKind` for ranks of one process: the giver names blocks, the taker reads them where they are."""

    name = "board"

    def __init__(self, window: PoolWindow, board: Board, process: int) -> None:
        self._window = window
        self._board = board
        self._process = process

    def giving(self) -> BoardEnd:
        self._board.windows.append(self._window)
        return BoardEnd(self._window, self._board, self._process, len(self._board.windows) - 1)

    def taking(self) -> BoardEnd:
        return BoardEnd(self._window, self._board, self._process)


class BoardEnd:
    """Satisfies `GivingTransport` and `TakingTransport`."""

    def __init__(self, window: PoolWindow, board: Board, process: int, place: int = -1) -> None:
        self.loader = NameLoader(window, 1 << 10)
        self._window = window
        self._board = board
        self._process = process
        self._place = place
        self._stream: Stream | None = None

    def greeting(self) -> dict[str, Any]:
        return {"process": self._process, "place": self._place}

    def fits(self, greeting: dict[str, Any]) -> bool:
        self._place = greeting["place"]
        return bool(greeting["process"] == self._process)

    def open(self, stream: Stream) -> None:
        self._stream = stream

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def ship(self, payload: Tensor, name: str, *fields: Any) -> None:
        assert self._stream is not None
        self._stream.send(name, *fields, body=tensor_bytes(payload))

    def probe(self, num_bytes: int) -> None:
        self.ship(self.staging(0), "probe")

    def land(self, body: Tensor, claim: Claim | None) -> Tensor:
        if claim is None:
            return body
        self._board.num_arrived += 1
        theirs = self._board.windows[self._place]
        first = claim.first_head - theirs.heads.start
        block_ids = body.numpy().view("<i8").tolist()
        payload = torch.empty(len(block_ids) * theirs.block_bytes(claim.num_heads), dtype=torch.uint8)
        pack_blocks(theirs.blocks_LB2KPH, block_ids, range(first, first + claim.num_heads), payload)
        return payload

    def close(self) -> None:
        return None


def carriers(board: Board, *names: str, process: int = 1) -> MakeCarrier:
    def make(window: PoolWindow, alike: dict[str, str]) -> Carrier:
        kinds: dict[str, TransportKind] = {
            "board": BoardTransport(window, board, process),
            "tcp": HostTransport(window),
        }
        return TcpCarrier(window, alike, "127.0.0.1", SECRET, [kinds[name] for name in names])

    return make


def run_over(theirs: MakeCarrier, ours: MakeCarrier, lease_s: float = DEADLINE_S) -> dict[str, float]:
    """The decode gang's gauges, after answers that are right."""
    with (
        hash_gang(1, theirs, lease_s=lease_s) as prefill,
        hash_gang(1, ours) as decode,
        hash_gang(1, None) as alone,
    ):
        want = [answer.tokens for answer in run_aggregated(alone, PROMPTS, SAMPLINGS)]
        assert [answer.tokens for answer in run_disaggregated(prefill, decode, PROMPTS, SAMPLINGS)] == want
        prefill.wait_idle()
        decode.wait_idle()
        assert decode.transfers[0].measure_link(prefill.source, WAIT_S).error is None or decode.failures()
        return decode.leader.gauges()


@pytest.mark.parametrize("theirs", [("board", "tcp"), ("tcp", "board"), ("board",)])
def test_the_taker_picks_its_first(theirs: Sequence[str]) -> None:
    board = Board()
    gauges = run_over(carriers(board, *theirs), carriers(board, "board", "tcp"))
    assert board.num_arrived > 0
    assert gauges["kv_transfer_blocks_total"] > 0
    assert gauges["kv_transfer_recomputed_tokens_total"] == 0


def test_a_transport_that_does_not_lead_there_is_passed_over() -> None:
    board = Board()
    gauges = run_over(carriers(board, "board", "tcp", process=1), carriers(board, "board", "tcp", process=2))
    assert board.num_arrived == 0
    assert gauges["kv_transfer_blocks_total"] > 0


def test_without_a_common_transport_the_prompt_is_computed() -> None:
    board = Board()
    gauges = run_over(carriers(board, "tcp"), carriers(board, "board"), lease_s=0.5)
    assert gauges["kv_transfer_blocks_total"] == 0
    assert gauges["kv_transfer_failures_no_transport_total"] == len(PROMPTS)
    assert gauges["kv_transfer_failures_peer_lost_total"] == 0


def test_transports_of_a_cpu() -> None:
    window = PoolWindow(KVPool(2, 4, 1, 4, 8, torch.float32, torch.device("cpu")))
    assert [transport.name for transport in make_transports("DEFAULT", window)] == ["tcp"]
    assert [transport.name for transport in make_transports("TCP", window)] == ["tcp"]
    for backend in ("NCCL", "IPC"):
        with pytest.raises(ValueError, match="KV cache is on a CPU"):
            make_transports(backend, window)


def test_a_connection_says_when_it_is_broken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = Stream(socket.create_connection(listener.getsockname()))
        theirs, _ = listener.accept()
    theirs.sendall(b"unread")
    assert not stream.is_broken()
    theirs.close()
    wait_until(stream.is_broken)
    stream.close()
    assert stream.is_broken()


def test_only_waits_in_vain_one_after_the_other_are_silence() -> None:
    """A process that stood still finds its own time over, not the peer's fault: what has come meanwhile is read."""
    waits = iter([BlockingIOError, BlockingIOError, 4, BlockingIOError, BlockingIOError, BlockingIOError])

    def move() -> int:
        outcome = next(waits)
        if isinstance(outcome, int):
            return outcome
        raise outcome

    assert _call(move, "the peer is silent") == 4
    with pytest.raises(TransferFailed, match="the peer is silent"):
        _call(move, "the peer is silent")
    assert next(waits, None) is None


def test_the_bench_on_a_cpu() -> None:
    shape = Shape("small", 2, 2, 16, "float32", 4)
    rows = bench_fetches(shape, "tcp", ("cpu", "cpu"), [1 << 12, 1 << 16], 1 << 20, num_runs=2)
    assert [row["mib"] for row in rows] == [2**-8, 2**-4]
    assert all(row["checked_gb_per_s"] > 0 for row in rows)
    kernels = bench_kernels(shape, "cpu", 1 << 16, num_runs=2)
    assert all(rate > 0 for name, rate in kernels.items() if name.endswith("gb_per_s"))


def test_the_bench_against_bare_sockets() -> None:
    row = bench_transfer_sockets.measure(Shape("small", 2, 2, 16, "float32", 16), 6 << 20, num_rounds=1).row()
    assert 1 < row["message_mb"] < 3
    assert all(rate > 0 for name, rate in row.items() if name.endswith(("gb_per_s", "bare", "buffer")))
