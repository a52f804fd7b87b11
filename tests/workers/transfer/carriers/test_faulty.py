"""Injected faults cost time, never a token, a block or a hang; each is counted by its kind."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence

import pytest

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.transfer.carriers.faulty import FAULTS, Fault, FaultyCarrier
from tensorweave.workers.transfer.carriers.loop import LoopNetwork
from tensorweave.workers.transfer.receiving.arrivals import GRACE_S
from tests.workers.transfer.expected import expected_tokens
from tests.workers.transfer_drive import (
    DEADLINE_S,
    Gang,
    MakeCarrier,
    SharedPools,
    faulty_carriers,
    hash_gang,
    loop_carriers,
    peer_carriers,
    run_disaggregated,
    tcp_carriers,
)
from tests.workers.waiting import WAIT_S

LOOK_S = 0.005
KIND_OF_FAULT = {
    "flip": "digest",
    "stale": "stale",
    "late": "late",
    "truncate": "truncated",
    "duplicate": "duplicate",
    "drop": "missing",
    "delay": "timeout",
    "die": "peer_lost",
}


class SteppedDeadlines:
    """A gang's clock, by which the deadlines of its fetches pass when nothing can come before them: each fetch that is
    open waits for a put that is delayed."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._has_ended = threading.Event()

    def __call__(self) -> float:
        return self.now_s

    @contextlib.contextmanager
    def stepping(self, gang: Gang) -> Iterator[None]:
        stepper = threading.Thread(target=self._run, args=(gang,), daemon=True)
        stepper.start()
        try:
            yield
        finally:
            self._has_ended.set()
            stepper.join(WAIT_S)

    def _run(self, gang: Gang) -> None:
        passed: set[tuple[int, str]] = set()
        while not self._has_ended.wait(LOOK_S):
            waiting = self._waiting(gang)
            if waiting is not None and waiting - passed:
                passed |= waiting
                self.now_s += DEADLINE_S + 2 * GRACE_S

    def _waiting(self, gang: Gang) -> set[tuple[int, str]] | None:
        """The fetches on each rank that wait for what is delayed; None if there are others."""
        waiting: set[tuple[int, str]] = set()
        for rank, (transfers, carrier) in enumerate(zip(gang.transfers, gang.carriers, strict=True)):
            assert isinstance(carrier, FaultyCarrier)
            with transfers._fetches._lock:
                for fetch in transfers._fetches._fetches.values():
                    if fetch.is_reported:
                        continue
                    is_muted = any(carrier.is_muted(read_id) for read_id in fetch.reads)
                    if not is_muted or fetch.ticket.ticket_id not in carrier._delayed:
                        return None
                    waiting.add((rank, fetch.request_id))
        return waiting


def run_faults(
    make: MakeCarrier, sizes: tuple[int, int], faults: Sequence[Fault], at_least: int, seed: int, whole: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Requests until so many faults have been injected; returns what was injected, and what was counted."""
    rng = random.Random(seed)
    made: list[FaultyCarrier] = []
    plan, deadlines = {"rate": 0.6, "faults": faults}, SteppedDeadlines()
    with (
        hash_gang(sizes[0], make, name="P", num_blocks=400) as prefill,
        hash_gang(sizes[1], faulty_carriers(make, made, **plan), name="D", num_blocks=400, clock=deadlines) as decode,
        deadlines.stepping(decode),
    ):
        num_rounds = 0
        while sum(carrier.injected.total() for carrier in made) < at_least:
            lengths = [32 * rng.randint(1, 8) if whole else rng.randint(2, 256) for _ in range(24)]
            prompts = [[rng.randrange(1000) for _ in range(length)] for length in lengths]
            samplings = [SamplingSpec(max_tokens=rng.randint(2, 6)) for _ in prompts]
            answers = run_disaggregated(prefill, decode, prompts, samplings, name=f"round{num_rounds}-")
            for prompt, sampling, answer in zip(prompts, samplings, answers, strict=True):
                assert answer.tokens == expected_tokens(prompt, sampling.max_tokens)
            num_rounds += 1
        prefill.wait_idle()
        decode.wait_idle()
        injected: dict[str, int] = {}
        for carrier in made:
            for fault, count in carrier.injected.items():
                injected[fault] = injected.get(fault, 0) + count
        assert prefill.failures() == {}
        return injected, decode.failures()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("size", [1, 2])
def test_each_fault_is_counted_by_its_kind(fault: Fault, size: int) -> None:
    injected, counted = run_faults(loop_carriers(LoopNetwork()), (1, size), [fault], 40, seed=1, whole=True)
    assert injected.keys() == {fault}
    if fault == "delay":
        assert counted["timeout"] >= 1
        assert counted["late"] >= injected["delay"]
    elif fault == "late":
        # A block that was read again and has arrived by then is a duplicate.
        assert counted["late"] >= 1
        assert counted["late"] + counted.get("duplicate", 0) >= injected["late"]
    elif fault == "die":
        # The first rank that fails ends the fetch on all: what the others lose meanwhile is not counted.
        assert 1 <= counted["peer_lost"] <= injected["die"]
        assert counted["truncated"] == injected["die"]
    else:
        # The same holds for what was on its way to the other rank then: it is late, or discarded.
        assert counted[KIND_OF_FAULT[fault]] >= (injected[fault] if size == 1 else 1)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2)], ids=str)
def test_all_faults_mixed_over_tcp(sizes: tuple[int, int]) -> None:
    injected, counted = run_faults(tcp_carriers, sizes, FAULTS, 150, seed=2, whole=False)
    assert injected.keys() == set(FAULTS)
    assert counted.keys() >= set(KIND_OF_FAULT.values())


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2)], ids=str)
def test_all_faults_mixed_where_receivers_read_the_senders_pools(sizes: tuple[int, int]) -> None:
    injected, counted = run_faults(peer_carriers(SharedPools()), sizes, FAULTS, 150, seed=3, whole=False)
    assert injected.keys() == set(FAULTS)
    assert counted.keys() >= {*KIND_OF_FAULT.values()} - {"truncated", "stale"}, (
        "a part that is damaged has wrong digests"
    )


@pytest.mark.slow
def test_a_thousand_faults() -> None:
    total: dict[str, int] = {}
    for seed, sizes in enumerate([(1, 1), (2, 3), (3, 2), (1, 2)]):
        injected, counted = run_faults(tcp_carriers, sizes, FAULTS, 260, seed=seed, whole=False)
        assert counted.keys() >= set(KIND_OF_FAULT.values())
        total = {fault: total.get(fault, 0) + injected[fault] for fault in injected}
    assert sum(total.values()) >= 1000
    assert min(total.values()) >= 60
