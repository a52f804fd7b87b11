"""Offers and their leases: when a lease ends, and when a ticket is released."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, Ticket
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.transfer.carriers.loop import LoopCarrier, LoopNetwork
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.sending.offers import Offers
from tensorweave.workers.transfer.transfers import TICK_S
from tests.workers.transfer.blocks import random_window
from tests.workers.transfer.expected import check_computed_locally, expected_tokens, one_request
from tests.workers.transfer_drive import Client, hash_gang, run_disaggregated
from tests.workers.waiting import WAIT_S, wait_until


def test_a_lease_expires_and_a_later_fetch_is_computed() -> None:
    now_s = [100.0]
    clock: dict[str, Any] = {"lease_s": 3.0, "clock": lambda: now_s[0]}
    with hash_gang(2, name="P", **clock) as prefill, hash_gang(name="D") as decode:
        for_prefill, for_decode = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        wait_until(lambda: prefill.gauge("kv_transfer_open_leases") == 2)
        now_s[0] += 2.9
        time.sleep(3 * TICK_S)
        assert all(kv_cache.used for kv_cache in prefill.kv_caches)
        now_s[0] += 0.2
        prefill.wait_idle()
        decode.leader.enqueue_request(for_decode)
        check_computed_locally(decode, for_decode, "gone")


def test_a_lease_can_be_given_up() -> None:
    with hash_gang(2, name="P") as prefill:
        for_prefill, _ = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        assert prefill.leader.cancel_request(for_prefill.request_id)
        prefill.wait_idle()
        assert not prefill.leader.cancel_request(for_prefill.request_id)


def test_a_refused_prefill_ends_the_fetch_that_waits_for_it() -> None:
    with hash_gang(name="P", max_seq_len=64) as prefill, hash_gang(2, name="D") as decode:
        for_prefill, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        with pytest.raises(ValueError, match="maximum context length is 64"):
            prefill.leader.enqueue_request(for_prefill)
        check_computed_locally(decode, for_decode, "gone")


def test_an_unused_ticket_is_released() -> None:
    """The decode gang has the prompt in its own tree, or it has one token alone."""
    with hash_gang(name="P") as prefill, hash_gang(2, name="D") as decode:
        prompts = [[4] * 65, [4] * 65, [9]]
        for i, prompt in enumerate(prompts):
            (answer,) = run_disaggregated(prefill, decode, [prompt], [SamplingSpec(max_tokens=3)], name=f"r{i}-")
            assert answer.tokens == expected_tokens(prompt, 3)
        prefill.wait_idle()


def test_a_ticket_is_valid_once() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode, hash_gang(name="E") as other:
        run_disaggregated(prefill, decode, [[6] * 90], [SamplingSpec(max_tokens=2)])
        prefill.wait_idle()
        ticket = Ticket("ticket-r0", prefill.source)
        request = GenerateRequest("again", [6] * 90, SamplingSpec(max_tokens=5), fetch=ticket)
        other.leader.enqueue_request(request)
        check_computed_locally(other, request, "gone")


def test_a_repeated_request_id_gets_no_second_lease() -> None:
    """A client may ask under the same name while the lease of its last request is open."""
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        first, fetch_first = one_request("same", prefill.source)
        again = replace(first, offer="another-ticket")
        for request in (first, again):
            prefill.leader.enqueue_request(request)
            Client(prefill).wait([request.request_id])
        fetch_again = replace(fetch_first, request_id="again", fetch=Ticket("another-ticket", prefill.source))
        decode.leader.enqueue_request(fetch_again)
        check_computed_locally(decode, fetch_again, "gone")
        prefill.leader.cancel_request(first.request_id)
        prefill.wait_idle()


def test_a_gang_waits_until_its_tickets_are_released() -> None:
    with hash_gang(name="P") as prefill:
        assert prefill.leader.wait_released(0.0)
        for_prefill, _ = one_request("held", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        assert not prefill.leader.wait_released(0.05)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(prefill.leader.wait_released, WAIT_S)
            prefill.leader.cancel_request(for_prefill.request_id)
            assert waiting.result(WAIT_S)
        prefill.wait_idle()


# ---- only settled KV is offered


class RecordingCarrier(LoopCarrier):
    """Keeps the offer."""

    offered: OfferedBlocks

    def offer(self, ticket_id: str, offered: OfferedBlocks) -> None:
        self.offered = offered


class OneSequence:
    """A KV cache whose only request has all blocks, in order."""

    def block_ids(self, request: LlmRequest) -> list[int]:
        return list(range(8))


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("num_computed", [0, 3, 4, 6, 11, 14])
def test_blocks_of_a_launched_step_are_offered_once_they_are_settled(num_computed: int, is_last: bool) -> None:
    """A request may have launched more tokens than it has settled: KV beyond `num_computed` is never offered."""
    window = random_window()
    carrier = RecordingCarrier(window, {}, "secret", LoopNetwork())
    offers = Offers(carrier, window, OneSequence(), 60.0, time.monotonic)  # type: ignore[arg-type]
    request = LlmRequest("r", 0, list(range(14)), 14, SamplingSpec(max_tokens=4), offer="ticket")
    request.num_computed, request.num_launched = num_computed, 14
    offers.offer([StepRow(request, 0, 14, int(is_last))])
    settled = [header.num_tokens for header in carrier.offered.headers(range(8))]
    num_whole, num_begun = divmod(num_computed, window.tokens_per_block)
    assert settled == [4] * num_whole + ([num_begun] if is_last and num_begun else [])
    assert not carrier.offered.is_complete
    if not is_last:
        request.num_computed = 14
        offers.offer([StepRow(request, 0, 14, 1)])
        assert [header.num_tokens for header in carrier.offered.headers(range(8))] == [4, 4, 4, 2]
    carrier.shutdown()
