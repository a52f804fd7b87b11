"""The parts of transfer one by one: windows, offers, heads shared out, intakes, arrivals, fingerprints, building."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tensorweave.cluster.llm_args import CacheTransceiverConfig
from tensorweave.cluster.protocol import KvEndpoint, KvSource
from tensorweave.workers.build import build_executor
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.step.kv_exchange import KvArrived
from tensorweave.workers.transfer.receiving.arrivals import GRACE_S, Arrivals, Report
from tensorweave.workers.transfer.receiving.block_receiver import Intake, TargetBlocks
from tensorweave.workers.transfer.receiving.fetches import share_heads
from tensorweave.workers.transfer.sending.offered_blocks import BlockTags, OfferedBlocks, Row
from tensorweave.workers.transfer.sending.ticket_table import fingerprint_difference
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.transports.loader import HOST_MESSAGE_BYTES, PoolLoader
from tensorweave.workers.transfer.window import PoolWindow
from tests.workers.engine_drive import engine_args, run_ranks
from tests.workers.tiny_models import make_model, rewrite_config
from tests.workers.waiting import WAIT_S


def random_window(num_heads: int = 3, first_head: int = 0, dtype: torch.dtype = torch.bfloat16) -> PoolWindow:
    pool = KVPool(2, 8, num_heads, 4, 6, dtype, torch.device("cpu"), first_head)
    pool.cache.copy_(torch.randn(pool.cache.shape, generator=torch.Generator().manual_seed(1)))
    return PoolWindow(pool)


def packed(window: PoolWindow, block_ids: list[int], heads: range) -> torch.Tensor:
    out = window.new_staging(len(block_ids) * window.block_bytes(len(heads)))
    window.pack(block_ids, heads, out)
    return out


def test_blocks_go_from_one_pool_to_another_head_by_head() -> None:
    source, target = random_window(3), random_window(2, first_head=1)
    payload = packed(source, [5, 2, 5], range(1, 3))
    target.unpack([0, 1, 7], range(2), payload)
    for theirs, ours in zip([5, 2, 5], [0, 1, 7], strict=True):
        assert torch.equal(target.digest(ours, 4), source.digest(theirs, 4)[:, 1:])
    assert torch.equal(packed(target, [0, 1, 7], range(2)), payload)
    found = target.payload_digests(payload, 2, [4, 4, 1])
    assert torch.equal(found[1], source.digest(2, 4)[:, 1:])
    assert torch.equal(found[2], source.digest(5, 1)[:, 1:])


# ---- offers


def read(offered: OfferedBlocks, rows: list[Row]) -> bytes | None:
    loader = PoolLoader(offered.window, HOST_MESSAGE_BYTES)
    return offered.read(rows, range(3), offered.window.new_staging(len(rows) * loader.block_bytes(3)), loader)


def test_a_offered_grows_is_taken_back_and_closes() -> None:
    window, tags = random_window(), BlockTags()
    offered = OfferedBlocks(window, tags, "prompt")
    assert offered.rows([0, 1]) == []
    offered.add([3, 6], [4, 4])
    offered.add([1], [2])
    rows = offered.rows([0, 1, 2, 3])
    assert [(row.index, row.num_tokens) for row in rows] == [(0, 4), (1, 4), (2, 2)]
    assert read(offered, rows) is not None
    offered.retract()
    assert read(offered, rows) is None
    offered.add([3, 6], [4, 4])
    again = offered.rows([0, 1])
    assert [row.tag for row in again] == [row.tag + 1 for row in rows[:2]]
    assert read(offered, rows[:1]) is None
    assert read(offered, again) is not None
    offered.close()
    assert read(offered, again) is None
    assert tags.num_held == 0


def test_a_block_on_two_offers_keeps_its_tag_until_both_are_closed() -> None:
    window, tags = random_window(), BlockTags()
    one, other = OfferedBlocks(window, tags, "a"), OfferedBlocks(window, tags, "b")
    one.add([4], [4])
    other.add([4, 5], [4, 4])
    one.close()
    assert read(other, other.rows([0, 1])) is not None
    assert tags.tag(4) == 0
    other.close()
    assert (tags.tag(4), tags.tag(5)) == (1, 1)


# ---- heads


def ends(*heads: tuple[int, int]) -> tuple[KvEndpoint, ...]:
    return tuple(KvEndpoint("h", port, first, num) for port, (first, num) in enumerate(heads))


def shares(endpoints: tuple[KvEndpoint, ...], heads: range, rank: int) -> list[tuple[int, int, int]]:
    found = share_heads(endpoints, heads, rank)
    assert not isinstance(found, str)
    return [(endpoint.port, heads.start, heads.stop) for endpoint, heads in found]


def test_each_rank_asks_those_who_hold_its_heads() -> None:
    assert shares(ends((0, 8)), range(8), 0) == [(0, 0, 8)]
    assert shares(ends((0, 3), (3, 3), (6, 2)), range(2, 7), 1) == [(0, 2, 3), (1, 3, 6), (2, 6, 7)]
    assert shares(ends((0, 1), (0, 1), (1, 1)), range(1), 1) == [(1, 0, 1)]
    assert shares(ends((0, 1), (0, 1), (1, 1)), range(1, 2), 2) == [(2, 1, 2)]


def test_rank_0_always_asks_rank_0() -> None:
    assert shares(ends((1, 1), (0, 1)), range(1), 0) == [(0, 0, 0), (1, 0, 1)]


def test_a_head_that_nobody_holds_is_named() -> None:
    assert share_heads(ends((0, 2)), range(1, 4), 0) == "heads: no giving rank holds KV head 2"
    assert share_heads((), range(1), 0) == "heads: no giving rank holds KV head 0"


# ---- intakes


class WantedBlocks:
    """Blocks 1 and 2 of a prompt, wanted by blocks 6 and 7 of another pool."""

    def __init__(self) -> None:
        self.source, self.target = random_window(), random_window()
        self.source.unpack([3], range(3), packed(self.source, [0], range(3)) ^ 1)
        self.before = packed(self.target, [6, 7], range(3))
        self.stats = TransferStats()
        self.arrival = TargetBlocks(self.target, 1, [6, 7])
        self.intake = Intake(self.arrival, range(3), {1: 4, 2: 3}, self.stats)
        self.payload = packed(self.source, [3, 4], range(3))
        digests = torch.stack([self.source.digest(3, 4), self.source.digest(4, 3)]).numpy().tobytes()
        self.intake.announce([Row(1, 10, 4), Row(2, 20, 3)], digests)

    def put(self, blocks: list[tuple[int, int]], payload: torch.Tensor | None = None) -> dict[Any, int]:
        self.intake.put(blocks, self.payload if payload is None else payload)
        return self.stats.failures()

    @property
    def arrived(self) -> torch.Tensor:
        return packed(self.target, [6, 7], range(3))


RIGHT = [(1, 10), (2, 20)]


def test_right_blocks_land() -> None:
    arrival = WantedBlocks()
    assert arrival.put(RIGHT) == {}
    assert torch.equal(arrival.arrived, arrival.payload)
    assert arrival.intake.num_verified() == 2
    assert arrival.intake.missing() == []


def test_only_the_right_ones_of_a_message_land() -> None:
    arrival = WantedBlocks()
    arrival.payload[3] ^= 4
    assert arrival.put(RIGHT) == {"digest": 1}
    half = len(arrival.payload) // 2
    assert torch.equal(arrival.arrived[half:], arrival.payload[half:])
    assert torch.equal(arrival.arrived[:half], arrival.before[:half])
    assert (arrival.intake.num_verified(), arrival.intake.missing()) == (0, [1])
    assert arrival.stats.failures() == {"digest": 1}


@pytest.mark.parametrize(
    ("blocks", "counted"),
    [
        ([(1, 9), (2, 19)], {"stale": 2}),
        ([(0, 10), (5, 20)], {"stale": 2}),
        ([(2, 20), (1, 10)], {"digest": 2}),
        ([(1, 10)], {"truncated": 1}),
        ([(1, 10), (2, 20), (2, 20)], {"truncated": 3}),
    ],
)
def test_wrong_blocks_never_land(blocks: list[tuple[int, int]], counted: dict[str, int]) -> None:
    arrival = WantedBlocks()
    assert arrival.put(blocks) == counted
    assert torch.equal(arrival.arrived, arrival.before)
    assert arrival.intake.num_verified() == 0


def test_digests_of_another_length_are_of_no_use() -> None:
    arrival = WantedBlocks()
    for digests in (b"", bytes(8), bytes(8 * 2 * 2 * 3 + 8)):
        arrival.intake.announce([Row(1, 11, 4), Row(2, 21, 3)], digests)
    assert arrival.put(RIGHT) == {"truncated": 6}
    assert arrival.intake.num_verified() == 2


def test_what_comes_twice_is_not_written_again() -> None:
    arrival = WantedBlocks()
    arrival.put(RIGHT)
    assert arrival.put(RIGHT, arrival.payload ^ 255) == {"duplicate": 2}
    assert torch.equal(arrival.arrived, arrival.payload)


def test_what_comes_late_is_not_written() -> None:
    arrival = WantedBlocks()
    arrival.arrival.close()
    assert arrival.put(RIGHT) == {"late": 2}
    assert torch.equal(arrival.arrived, arrival.before)


# ---- rank 0's account


class StepInput:
    def __init__(self) -> None:
        self.arrived: list[KvArrived] = []

    def put_arrived(self, arrived: KvArrived) -> None:
        self.arrived.append(arrived)

    def put_released(self, request_id: str) -> None:
        raise AssertionError("no lease here")


def account(num_ranks: int) -> tuple[Arrivals, StepInput, list[float]]:
    news, now = StepInput(), [100.0]
    arrivals = Arrivals(num_ranks, TransferStats(), lambda: now[0])
    arrivals.start(news)
    return arrivals, news, now


def test_a_fetch_has_landed_when_it_has_on_all_ranks() -> None:
    arrivals, news, _ = account(3)
    arrivals.report(Report("r", 2, 100, True))  # a rank may be ahead of this one's step loop
    arrivals.expect("r", 32, 100, 60.0)
    arrivals.report(Report("r", 0, 100, True, first_token=7))
    assert news.arrived == []
    arrivals.report(Report("r", 1, 64, False))
    assert news.arrived == [KvArrived("r", 64, 7)]


def test_a_rank_with_nothing_ends_it_at_once() -> None:
    arrivals, news, _ = account(3)
    arrivals.expect("r", 32, 100, 60.0)
    arrivals.report(Report("r", 1, 32, False))
    assert news.arrived == [KvArrived("r", 32, None)]
    arrivals.report(Report("r", 0, 100, True, first_token=7))
    assert len(news.arrived) == 1


def test_silent_ranks_are_waited_for_until_the_deadline() -> None:
    arrivals, news, now = account(2)
    arrivals.expect("r", 0, 100, 60.0)
    arrivals.report(Report("r", 0, 100, True, first_token=7))
    arrivals.tick(now[0] + 60.0)
    assert news.arrived == []
    arrivals.tick(now[0] + 60.0 + GRACE_S)
    assert news.arrived == [KvArrived("r", 0, 7)]


def test_after_a_failure_the_others_have_a_moment() -> None:
    arrivals, news, now = account(2)
    arrivals.expect("r", 0, 100, 60.0)
    arrivals.report(Report("r", 0, 64, False))
    arrivals.tick(now[0] + GRACE_S / 2)
    assert news.arrived == []
    arrivals.tick(now[0] + GRACE_S)
    assert news.arrived == [KvArrived("r", 0, None)]


# ---- what must be alike, and building


def test_the_first_difference_is_named() -> None:
    assert fingerprint_difference({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) is None
    assert fingerprint_difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == (
        "b: '2' where the KV is given, '3' where it is taken"
    )
    assert fingerprint_difference({"a": "1"}, {"a": "1", "c": "3"}) == (
        "c: None where the KV is given, '3' where it is taken"
    )


def test_a_model_digest_tells_models_apart(tmp_path: Path) -> None:
    digests = set()
    for name, seed in (("one", 0), ("copy", 0), ("other weights", 1)):
        make_model("llama", tmp_path / name, seed=seed)
        digests.add(model_digest(tmp_path / name))
    assert len(digests) == 2
    rewrite_config(tmp_path / "copy", lambda fields: fields.update(rope_theta=5.0))
    assert model_digest(tmp_path / "copy") not in digests


def test_an_executor_is_built_with_transfer(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    args = engine_args(tmp_path, cache_transceiver_config=CacheTransceiverConfig(backend="DEFAULT"))

    def build(comm: Comm) -> PyExecutor:
        return build_executor(args, comm, transfer_host="127.0.0.1", transfer_secret="s")

    ranks = run_ranks(3, build)
    heads = [(end.first_head, end.num_heads) for rank in ranks if (end := rank.kv_endpoint) is not None]
    assert heads == [(0, 1), (0, 2), (1, 1)]
    alone = build(SoloComm())
    assert alone.kv_fingerprint == ranks[0].kv_fingerprint == ranks[2].kv_fingerprint
    assert alone.kv_fingerprint["layout"] == "3 layers, 2 KV heads of 8"
    source = KvSource("g", tuple(rank.kv_endpoint for rank in ranks if rank.kv_endpoint), ranks[0].kv_fingerprint, "s")
    link = alone.measure_link(source, WAIT_S)
    assert link.error is None
    assert link.bytes_per_s > 1e5
    assert 0 < link.latency_s < WAIT_S
    closed = alone.measure_link(KvSource("g", source.endpoints, source.fingerprint, "guessed"), WAIT_S)
    assert "wrong secret" in str(closed.error)
    misfit = alone.measure_link(KvSource("g", source.endpoints, {**source.fingerprint, "dtype": "bfloat16"}, "s"))
    assert str(misfit.error).startswith("dtype: ")
    for rank in (*ranks, alone):
        rank._transfers.shutdown()


def test_transfer_without_a_secret_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    args = engine_args(tmp_path, cache_transceiver_config=CacheTransceiverConfig(backend="TCP"))
    with pytest.raises(ValueError, match="no secret"):
        build_executor(args, SoloComm())
    without = build_executor(engine_args(tmp_path), SoloComm(), transfer_secret="s")
    assert without.kv_endpoint is None
    assert without.kv_fingerprint == {}
