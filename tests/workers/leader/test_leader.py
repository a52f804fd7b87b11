"""A leader and its links, over real sockets in one process, with an executor whose tokens are a hash of the context."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tensorweave.cluster import socket_link, wire
from tensorweave.cluster.errors import NotReady, Overloaded, RequestRejected, TensorweaveError, WorkerLost
from tensorweave.cluster.link import FoundAttempt
from tensorweave.cluster.protocol import PROTOCOL_VERSION, GangAddress, GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.cluster.socket_link import SILENCE_LIMIT_S, SocketLink
from tensorweave.workers.fakes.fake_executor import FAKE_INFO, FakeExecutor, fake_output
from tensorweave.workers.leader import server as leader_module
from tensorweave.workers.leader.server import LeaderServer
from tests.workers.waiting import WAIT_S

SECRET = "s3cret"
HOST = "127.0.0.1"
PROMPT = [5, 6, 7]
ENDLESS = 10**9


pytestmark = pytest.mark.usefixtures("patient_links")


def _request(request_id: str, num_tokens: int = 4, prompt: list[int] | None = None) -> GenerateRequest:
    return GenerateRequest(request_id, PROMPT if prompt is None else prompt, SamplingSpec(max_tokens=num_tokens))


def _address(port: int, secret: str = SECRET) -> GangAddress:
    return GangAddress("g0", 0, "both", HOST, port, secret, FAKE_INFO)


@contextlib.contextmanager
def _serving(executor: FakeExecutor, **options: int) -> Iterator[tuple[LeaderServer, GangAddress]]:
    leader = LeaderServer(executor, HOST, SECRET, **options)
    try:
        yield leader, _address(leader.start())
    finally:
        leader.stop(WAIT_S)
        executor.shutdown()


async def _connect(address: GangAddress) -> SocketLink:
    return await SocketLink.connect(address, timeout_s=WAIT_S)


@contextlib.asynccontextmanager
async def _linked(address: GangAddress) -> AsyncIterator[SocketLink]:
    link = await _connect(address)
    try:
        yield link
    finally:
        link.close()


async def _tokens(link: SocketLink, request: GenerateRequest) -> list[int]:
    return [token async for chunk in link.generate(request) for token in chunk.token_ids]


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.005)


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await body()

    asyncio.run(bounded())


def test_many_requests_on_two_links_get_their_own_tokens() -> None:
    async def body() -> None:
        async with _linked(address) as one, _linked(address) as two:
            assert one.info == FAKE_INFO
            prompts = [[n, n + 1, n * 7] for n in range(30)]
            jobs = [
                _tokens(link, _request(f"r{n}", 5 + n, prompt))
                for n, (prompt, link) in enumerate(zip(prompts, [one, two] * 15, strict=True))
            ]
            answers = await asyncio.gather(*jobs)
            assert answers == [fake_output(prompt, 5 + n) for n, prompt in enumerate(prompts)]
            assert one.num_inflight == two.num_inflight == 0
            assert await one.stats(WAIT_S) == [{"iter": executor.num_steps}]

    executor = FakeExecutor()
    with _serving(executor) as (leader, address):
        _run(body)
        assert leader.num_open == 0


def test_refusals_reach_the_request_and_nobody_else() -> None:
    async def body() -> None:
        async with _linked(address) as link:
            executor.hold()
            first = asyncio.create_task(_tokens(link, _request("a")))
            await _until(lambda: executor.num_requests == 1)
            with pytest.raises(RequestRejected, match="empty") as rejected:
                await _tokens(link, _request("b", prompt=[]))
            assert rejected.value.param == "prompt"
            with pytest.raises(Overloaded) as overloaded:
                await _tokens(link, _request("c"))
            assert overloaded.value.retry_after_s == 1.0
            with pytest.raises(RequestRejected, match="does not fit"):
                await _tokens(link, _request("d", prompt=[2**40]))
            executor.hold(False)
            assert await first == fake_output(PROMPT, 4)

    executor = FakeExecutor(max_requests=1)
    with _serving(executor) as (_, address):
        _run(body)


def test_leaving_early_cancels_at_the_gang() -> None:
    async def body() -> None:
        async with _linked(address) as link:
            async with contextlib.aclosing(link.generate(_request("a", ENDLESS))) as chunks:
                assert list((await anext(chunks)).token_ids) == fake_output(PROMPT, 1)
                assert executor.num_requests == 1
            await _until(lambda: executor.num_requests == 0)
            stuck = asyncio.create_task(_tokens(link, _request("b", ENDLESS)))
            await _until(lambda: executor.num_requests == 1)
            stuck.cancel()
            await _until(lambda: executor.num_requests == 0)
            assert link.is_open
            assert link.num_inflight == 0

    executor = FakeExecutor(step_s=0.001)
    with _serving(executor) as (_, address):
        _run(body)


def test_a_client_that_vanishes_has_its_requests_cancelled() -> None:
    async def body() -> None:
        async with _linked(address) as stays:
            link = await _connect(address)
            streams = [asyncio.create_task(_tokens(link, _request(f"r{n}", ENDLESS))) for n in range(3)]
            await _until(lambda: executor.num_requests == 3 and executor.num_steps > 3)
            executor.hold()
            mine = asyncio.create_task(_tokens(stays, _request("mine", 50)))
            await _until(lambda: executor.num_requests == 4)
            executor.allow(10)
            link.close()
            results = await asyncio.gather(*streams, return_exceptions=True)
            assert [type(result) for result in results] == [WorkerLost] * 3
            await _until(lambda: executor.num_requests == 1)
            executor.hold(False)
            assert await mine == fake_output(PROMPT, 50)

    executor = FakeExecutor(step_s=0.005)
    with _serving(executor) as (leader, address):
        _run(body)
        assert leader.num_open == 0


def test_a_client_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    async def body() -> None:
        sock = socket.create_connection((HOST, address.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(wire.pack_frame("hello", PROTOCOL_VERSION, SECRET))
        executor.hold()
        for n in range(60):
            sock.sendall(wire.pack_frame("add", _request(f"slow{n}", ENDLESS).to_wire()))
        async with _linked(address) as link:
            await _until(lambda: executor.num_requests == 60)
            executor.hold(False)
            assert await _tokens(link, _request("good", 20)) == fake_output(PROMPT, 20)
            await _until(lambda: executor.num_requests == 0)
            assert await _tokens(link, _request("later", 20)) == fake_output(PROMPT, 20)
        sock.close()

    executor = FakeExecutor()
    with _serving(executor, max_unsent_bytes=64 << 10) as (_, address):
        _run(body)


def test_an_executor_that_fails_tells_every_request_and_closes() -> None:
    async def body() -> None:
        async with _linked(address) as link:
            streams = [asyncio.create_task(_tokens(link, _request(f"r{n}", ENDLESS))) for n in range(3)]
            await _until(lambda: executor.num_requests == 3)
            executor.fail(WorkerLost("rank 1 is gone"))
            for stream in streams:
                with pytest.raises(WorkerLost, match="rank 1 is gone"):
                    await stream
            await link.wait_closed()
            with pytest.raises(WorkerLost, match="rank 1 is gone"):
                await _tokens(link, _request("late"))

    executor = FakeExecutor(step_s=0.002)
    with _serving(executor) as (_, address):
        _run(body)


def test_a_draining_leader_finishes_what_it_has_and_takes_no_more() -> None:
    async def body() -> None:
        async with _linked(address) as link:
            executor.hold()
            stream = asyncio.create_task(_tokens(link, _request("a", 40)))
            await _until(lambda: executor.num_requests == 1)
            drained = asyncio.create_task(asyncio.to_thread(leader.drain, WAIT_S))
            await _until(lambda: leader._table.is_draining)
            with pytest.raises(NotReady, match="draining"):
                await _tokens(link, _request("b"))
            assert not drained.done()
            executor.hold(False)
            assert await stream == fake_output(PROMPT, 40)
            assert await drained

    executor = FakeExecutor()
    with _serving(executor) as (leader, address):
        _run(body)


def test_a_retired_link_ends_with_its_last_request() -> None:
    async def body() -> None:
        executor.hold()
        link = await _connect(address)
        stream = asyncio.create_task(_tokens(link, _request("a", 20)))
        await _until(lambda: executor.num_requests == 1)
        link.close_when_idle()
        assert link.is_open
        executor.hold(False)
        assert await stream == fake_output(PROMPT, 20)
        assert not link.is_open

    executor = FakeExecutor()
    with _serving(executor) as (_, address):
        _run(body)


@pytest.mark.parametrize(
    ("first_bytes", "complaint"),
    [
        (wire.pack_frame("hello", PROTOCOL_VERSION, "wrong"), "wrong secret"),
        (wire.pack_frame("add", "x"), "must be hello"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "over the limit"),
        (wire.pack_frame("hello", PROTOCOL_VERSION, "x" * 5000), "over the limit"),
        (wire.pack_frame("hello", PROTOCOL_VERSION, SECRET) + wire.pack_frame("add", [1, 2]), "malformed request"),
        (wire.pack_frame("hello", PROTOCOL_VERSION, SECRET) + wire.pack_frame("dance"), "unexpected 'dance'"),
        (
            wire.pack_frame("hello", PROTOCOL_VERSION, SECRET)
            + wire.pack_frame("add", ["r", 5, [], 0, 0, None, None, None, None, 0, 0]),
            "token",
        ),
    ],
)
def test_strangers_and_nonsense_are_shown_the_door(first_bytes: bytes, complaint: str) -> None:
    async def body() -> None:
        async with _linked(address) as link:
            reader, writer = await asyncio.open_connection(HOST, address.port)
            writer.write(first_bytes)
            frames = [frame async for frame in wire.FrameReader(reader)]
            assert frames[-1][0] == "error"
            assert complaint in frames[-1][1]["message"]
            writer.close()
            assert await _tokens(link, _request("good")) == fake_output(PROMPT, 4)

    executor = FakeExecutor()
    with _serving(executor) as (_, address):
        _run(body)
        assert executor.num_requests == 0


def test_of_many_who_never_say_hello_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "_MAX_STRANGERS", 3)

    async def body() -> None:
        async with _linked(address) as link:
            idle = [await asyncio.open_connection(HOST, address.port) for _ in range(10)]
            for reader, _ in idle[:7]:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            assert await _tokens(link, _request("good")) == fake_output(PROMPT, 4)
            for _, writer in idle:
                writer.close()

    with _serving(FakeExecutor()) as (_, address):
        _run(body)


def test_connecting_to_nobody_or_with_a_wrong_secret_is_an_error_in_time() -> None:
    async def body() -> None:
        with pytest.raises(TensorweaveError, match="wrong secret"):
            await _connect(replace(address, secret="other"))
        with socket.create_server((HOST, 0)) as mute:
            took_s: list[float] = []
            while len(took_s) < 8 and min(took_s, default=2.0) >= 2.0:  # this machine may stand still meanwhile
                before_s = time.monotonic()
                with pytest.raises(NotReady, match="no answer from its leader"):
                    await SocketLink.connect(_address(mute.getsockname()[1]), timeout_s=0.3)
                took_s.append(time.monotonic() - before_s)
            assert 0.3 <= min(took_s) < 2.0
        with socket.socket() as bound:
            bound.bind((HOST, 0))  # and does not listen: nobody else will meanwhile
            with pytest.raises(NotReady):
                await SocketLink.connect(_address(bound.getsockname()[1]), timeout_s=1.0)

    with _serving(FakeExecutor()) as (_, address):
        _run(body)


def test_a_leader_that_falls_silent_loses_its_requests_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process keeps its sockets open: only silence tells. The link counts beats, however long they last."""
    assert SILENCE_LIMIT_S < 10.0
    monkeypatch.setattr(socket_link, "SILENCE_LIMIT_S", SILENCE_LIMIT_S)

    async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(wire.pack_frame("hello", PROTOCOL_VERSION, FAKE_INFO.to_wire()))

    async def body() -> None:
        server = await asyncio.start_server(serve_once, HOST, 0)
        link = await _connect(_address(server.sockets[0].getsockname()[1]))
        before_s = time.monotonic()
        with pytest.raises(WorkerLost, match="silent for 5 s"):
            await _tokens(link, _request("a"))
        assert time.monotonic() - before_s > 4.0
        server.close()

    _run(body)


def test_an_idle_leader_is_not_taken_for_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_link, "SILENCE_LIMIT_S", SILENCE_LIMIT_S)

    async def body() -> None:
        async with _linked(address) as link:
            executor.hold()
            stream = asyncio.create_task(_tokens(link, _request("a")))
            await asyncio.sleep(SILENCE_LIMIT_S + 2.0)
            executor.hold(False)
            assert await stream == fake_output(PROMPT, 4)

    executor = FakeExecutor()
    with _serving(executor) as (_, address):
        _run(body)


def test_stopping_ends_both_threads_and_the_links() -> None:
    async def body() -> None:
        link = await _connect(address)
        stream = asyncio.create_task(_tokens(link, _request("a", ENDLESS)))
        await _until(lambda: executor.num_requests == 1)
        await asyncio.to_thread(leader.stop, WAIT_S)
        with pytest.raises(WorkerLost, match="shutting down"):
            await stream

    executor = FakeExecutor(step_s=0.002)
    with _serving(executor) as (leader, address):
        _run(body)
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"leader-loop", "leader-pump"}


def _kept(request_id: str, num_tokens: int, grace_s: float = WAIT_S) -> GenerateRequest:
    return replace(_request(request_id, num_tokens), grace_s=grace_s)


async def _attached(link: SocketLink, request_id: str) -> list[TokenChunk]:
    return [chunk async for chunk in link.attach(request_id)]


async def _find(link: SocketLink, request_id: str) -> FoundAttempt:
    """Once the leader knows that its router is lost."""
    found: FoundAttempt | None = None
    async with asyncio.timeout(WAIT_S):
        while (found := await link.find(request_id, WAIT_S)) is None:
            await asyncio.sleep(0.01)
    return found


def _joined(chunks: list[TokenChunk]) -> list[int]:
    """Their tokens, each at the place that its chunk claims."""
    tokens: list[int] = []
    for chunk in chunks:
        assert chunk.start == len(tokens)
        tokens += chunk.token_ids
    return tokens


def test_another_router_picks_up_what_a_lost_one_left() -> None:
    drawn = replace(_kept("mine/d1", 60), sampling=SamplingSpec(60, temperature=1.0, seed=77))

    async def body() -> None:
        executor.hold()
        lost = await _connect(address)
        heard: list[int] = []

        async def hear() -> None:
            async for chunk in lost.generate(drawn):
                heard.extend(chunk.token_ids)

        stream = asyncio.create_task(hear())
        executor.allow(20)
        await _until(lambda: len(heard) == 20)
        lost.close()
        with pytest.raises(WorkerLost):
            await stream
        async with _linked(address) as link:
            assert await _find(link, "mine") == FoundAttempt("mine/d1", 77)
            assert await link.find("other", WAIT_S) is None
            attaching = asyncio.create_task(_attached(link, "mine/d1"))
            await _until(lambda: link.num_inflight == 1)
            assert await link.find("mine", WAIT_S) is None, "it has a client again"
            with pytest.raises(NotReady, match="nothing to attach to"):
                await _attached(link, "mine/d1")
            executor.hold(False)
            chunks = await attaching
            assert _joined(chunks) == fake_output(PROMPT, 60)
            assert chunks[-1].finish_reason == "length"
            assert link.num_inflight == 0
            assert await link.find("mine", WAIT_S) is None, "its client has it"
            assert leader.num_kept == 0

    executor = FakeExecutor()
    with _serving(executor) as (leader, address):
        _run(body)
        assert leader.num_open == 0


def test_requests_of_one_name_at_two_routers_have_an_answer_each() -> None:
    """A trace id is no claim on the answer that another client waits for, nor on one that another client was given."""

    async def body() -> None:
        async with _linked(address) as one, _linked(address) as other:
            executor.hold()
            first = asyncio.create_task(_tokens(one, _kept("trace/d1-a", 20)))
            await _until(lambda: executor.num_requests == 1)
            assert await other.find("trace", WAIT_S) is None
            second = asyncio.create_task(_tokens(other, _kept("trace/d1-b", 20)))
            await _until(lambda: executor.num_requests == 2)
            executor.hold(False)
            assert await first == await second == fake_output(PROMPT, 20)
            assert await other.find("trace", WAIT_S) is None
            await _until(lambda: leader.num_kept == 0)
            async with contextlib.aclosing(one.generate(_kept("trace/d1-c", ENDLESS))) as chunks:
                await anext(chunks)
                async with contextlib.aclosing(other.generate(_kept("trace/d1-d", ENDLESS))) as more:
                    await anext(more)
                other.cancel("trace/d1-c")  # it is not its own
                for _ in range(3):
                    await anext(chunks)
            await _until(lambda: executor.num_requests == 0)

    executor = FakeExecutor(step_s=0.002)
    with _serving(executor) as (leader, address):
        _run(body)


def test_an_answer_that_ended_is_found_once_its_router_is_lost() -> None:
    """As long as the router has not said that it has given the last of it to its client."""

    async def body() -> None:
        lost = await _connect(address)
        chunks = lost.generate(_kept("mine/d1", 5))
        while (await anext(chunks)).finish_reason is None:
            pass
        async with _linked(address) as link:
            assert await link.find("mine", WAIT_S) is None
            lost.close()
            found = await _find(link, "mine")
            assert _joined(await _attached(link, found.request_id)) == fake_output(PROMPT, 5)
            await _until(lambda: leader.num_kept == 0)
        await chunks.aclose()

    executor = FakeExecutor(step_s=0.002)
    with _serving(executor) as (leader, address):
        _run(body)


def test_an_attempt_that_took_over_gives_the_tokens_before_it_too() -> None:
    async def body() -> None:
        lost = await _connect(address)
        async with _linked(address) as second:
            executor.hold()
            resumed = replace(_kept("mine/d2", 32), prompt_token_ids=[*PROMPT, 91, 92], num_replayed=2)
            mine = asyncio.create_task(_tokens(lost, resumed))
            await _until(lambda: executor.num_requests == 1)
            executor.allow(10)
            lost.close()
            await asyncio.gather(mine, return_exceptions=True)
            found = await _find(second, "mine")
            attaching = asyncio.create_task(_attached(second, found.request_id))
            await _until(lambda: second.num_inflight == 1)
            executor.hold(False)
            assert _joined(await attaching) == [91, 92, *fake_output([*PROMPT, 91, 92], 30)]

    executor = FakeExecutor()
    with _serving(executor) as (_, address):
        _run(body)


def test_nobody_comes_and_the_grace_ends_it() -> None:
    """Of those with a short grace nothing is left; those with a long one are still there."""

    async def body() -> None:
        lost = await _connect(address)
        requests = [_kept(f"r{n}", ENDLESS, grace_s=0.4) for n in range(3)]
        requests.append(_kept("long", ENDLESS))
        streams = [asyncio.create_task(_tokens(lost, request)) for request in requests]
        offer = replace(_kept("r3/p1", ENDLESS, grace_s=0.4), offer="ticket")
        ended = [lost.generate(r) for r in (offer, _kept("over", 2), _kept("over soon", 2, grace_s=0.4))]
        for stream in ended:
            while (await anext(stream)).finish_reason is None:
                pass
        await _until(lambda: executor.num_requests == 4)
        lost.close()
        await asyncio.gather(*streams, return_exceptions=True)
        for stream in ended:
            await stream.aclose()
        async with _linked(address) as link:
            await _until(lambda: executor.num_requests == 1)
            await _until(lambda: leader.num_open == leader.num_kept == 1)
            assert await link.find("long", WAIT_S)
            assert await link.find("over", WAIT_S)
            assert await link.find("over soon", WAIT_S) is None
            with pytest.raises(NotReady, match="nothing to attach to"):
                await _attached(link, "r0")

    executor = FakeExecutor(step_s=0.002)
    with _serving(executor) as (leader, address):
        _run(body)


def test_a_cancel_ends_a_request_at_once_whatever_its_grace() -> None:
    async def body() -> None:
        async with _linked(address) as link, _linked(address) as other:
            async with contextlib.aclosing(link.generate(_kept("a", ENDLESS))) as chunks:
                await anext(chunks)
            await _until(lambda: executor.num_requests == 0)
            assert await other.find("a", WAIT_S) is None

    executor = FakeExecutor(step_s=0.001)
    with _serving(executor) as (_, address):
        _run(body)


def test_an_attach_that_is_given_up_leaves_nothing() -> None:
    async def body() -> None:
        async with _linked(address) as link:
            lost = await _connect(address)
            stream = asyncio.create_task(_tokens(lost, _kept("a", ENDLESS)))
            await _until(lambda: executor.num_requests == 1)
            lost.close()
            await asyncio.gather(stream, return_exceptions=True)
            await _until(lambda: len(leader._table.clients) == 1)  # else the lost one is still taken for a listener
            attaching = asyncio.create_task(_attached(link, "a"))
            await asyncio.sleep(0)
            attaching.cancel()
            await asyncio.gather(attaching, return_exceptions=True)
            await _until(lambda: executor.num_requests == 0)
            assert link.num_inflight == 0

    executor = FakeExecutor(step_s=0.002)
    with _serving(executor) as (leader, address):
        _run(body)


def test_a_cancel_after_the_end_reaches_the_executor() -> None:
    """A request that ended on offer has a lease there; only the executor knows."""

    async def body() -> None:
        async with _linked(address) as link:
            chunks = [chunk async for chunk in link.generate(replace(_request("p", 9), offer="ticket"))]
            assert [chunk.finish_reason for chunk in chunks] == ["not_finished"]
            link.cancel("p")
            await _until(lambda: executor.given_up == ["p"])

    executor = FakeExecutor()
    with _serving(executor) as (_, address):
        _run(body)


def _stored(parent: bytes, *names: bytes) -> list[dict[str, Any]]:
    """As the KV manager tells it: an event a block."""
    chain = [parent, *names]
    return [
        {"type": "stored", "parent_hash": above.hex(), "blocks": [{"block_hash": name.hex()}]}
        for above, name in itertools.pairwise(chain)
    ]


def test_links_follow_the_kv_cache_from_whenever_they_join() -> None:
    async def body() -> None:
        executor.put_events({"type": "created"}, *_stored(b"root", b"a", b"b"))
        async with _linked(address) as early:
            await _until(lambda: len(early.kv) == 2)
            executor.put_events(*_stored(b"b", b"c"), {"type": "removed", "block_hashes": [b"a".hex()]})
            await _until(lambda: early.kv.cached_tokens([b"b", b"c"]) == 64)
            async with _linked(address) as late:
                await _until(lambda: late.kv.is_synced)
                assert len(late.kv) == len(early.kv) == 2
                assert early.kv.num_resyncs == 0
                # An event is lost before it reaches the leader: only what comes after it is known.
                executor.put_events(*_stored(b"c", b"d"), num_lost=1)
                for link in (early, late):
                    await _until(lambda link=link: link.kv.cached_tokens([b"d"]) == 32)
                    assert len(link.kv) == 1

    executor = FakeExecutor()
    with _serving(executor) as (_, address):
        _run(body)
