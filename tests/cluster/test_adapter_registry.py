"""The supervisor's adapters: every gang has them before it is ready, whatever is loaded meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.adapter_registry import AdapterRecord, AdapterRegistry
from tensorweave.cluster.errors import NotReady, WorkerLost
from tensorweave.cluster.watchers import Watchers


class Gang:
    """`files` are digests by path; a missing one is refused. `gate` holds loads up."""

    def __init__(self, gang_id: str, files: Mapping[str, bytes]) -> None:
        self.gang_id = gang_id
        self.files = files
        self.loaded: dict[str, Adapter] = {}
        self.kept = AdapterRecord()
        self.is_lost = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def load_adapter(self, name: str, path: str) -> Adapter:
        await self.gate.wait()
        if self.is_lost:
            raise WorkerLost("it is gone")
        if path not in self.files:
            raise ValueError(f"no files at {path}")
        self.loaded[name] = Adapter(name, self.files[path], path)
        return self.loaded[name]

    async def keep_adapters(self, record: AdapterRecord) -> None:
        if self.is_lost:
            raise WorkerLost("it is gone")
        self.kept = record


FILES = {"/one": b"1" * 16, "/two": b"2" * 16}


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_new_gang_gets_what_is_configured_and_what_was_loaded() -> None:
    async def test() -> None:
        ready: list[Gang] = []
        registry = AdapterRegistry({"a": "/one"}, lambda: ready)
        first, second = Gang("first", FILES), Gang("second", FILES)
        await registry.install(first)
        assert [adapter.name for adapter in registry.all] == ["a"]
        ready.append(first)
        await registry.load("b", "/two")
        await registry.install(second)
        assert set(second.loaded) == {"a", "b"}
        assert second.kept == first.kept

    run(test)


def test_what_is_loaded_while_a_gang_starts_gets_to_it() -> None:
    async def test() -> None:
        first, starting = Gang("first", FILES), Gang("starting", FILES)
        registry = AdapterRegistry({"a": "/one"}, lambda: [first])
        await registry.install(first)
        starting.gate.clear()
        installing = asyncio.create_task(registry.install(starting))
        await registry.load("b", "/two")
        starting.gate.set()
        await installing
        assert set(starting.loaded) == {"a", "b"}

    run(test)


def test_a_gang_that_gets_ready_during_a_load_loads_it_too() -> None:
    async def test() -> None:
        first, late = Gang("first", FILES), Gang("late", FILES)
        ready = [first]
        registry = AdapterRegistry(ready=lambda: ready)
        first.gate.clear()
        loading = asyncio.create_task(registry.load("a", "/one"))
        await asyncio.sleep(0)
        ready.append(late)
        first.gate.set()
        await loading
        assert set(late.loaded) == {"a"}

    run(test)


def test_what_is_refused_changes_nothing() -> None:
    async def test() -> None:
        first, second = Gang("first", FILES), Gang("second", {"/one": b"x" * 16})
        registry = AdapterRegistry(ready=lambda: [first, second])
        with pytest.raises(ValueError, match="no files at /two"):
            await registry.load("a", "/two")
        with pytest.raises(ValueError, match="different files"):
            await registry.load("a", "/one")
        assert registry.all == ()
        with pytest.raises(ValueError, match="there is no adapter 'a'; there are: none"):
            await registry.unload("a")

    run(test)


def test_lost_gangs_do_not_count_but_one_must_be_there() -> None:
    async def test() -> None:
        first, lost = Gang("first", FILES), Gang("lost", FILES)
        lost.is_lost = True
        registry = AdapterRegistry(ready=lambda: [first, lost])
        assert (await registry.load("a", "/one")).digest == FILES["/one"]
        first.is_lost = True
        with pytest.raises(NotReady):
            await registry.load("b", "/two")

    run(test)


def test_names_are_given_anew_only_where_that_is_meant() -> None:
    async def test() -> None:
        registry = AdapterRegistry(ready=lambda: [gang])
        gang = Gang("gang", FILES)
        await registry.load("a", "/one", is_new=True)
        with pytest.raises(ValueError, match="there is an adapter 'a' already"):
            await registry.load("a", "/two", is_new=True)
        await registry.load("a", "/two")
        assert [adapter.digest for adapter in registry.all] == [FILES["/two"]]
        await registry.unload("a")
        assert registry.all == ()

    run(test)


def test_files_that_are_gone_keep_no_gang_from_serving_once_they_were_there() -> None:
    async def test() -> None:
        registry = AdapterRegistry({"a": "/one"})
        with pytest.raises(ValueError, match="no files at /one"):
            await registry.install(Gang("first", {}))
        await registry.install(Gang("second", FILES))
        await registry.install(Gang("third", {}))
        assert len(registry.all) == 1

    run(test)


def test_a_supervisor_that_takes_over_goes_on_from_what_gangs_keep() -> None:
    async def test() -> None:
        gang = Gang("gang", FILES)
        registry = AdapterRegistry({"a": "/one"}, lambda: [gang])
        await registry.configure({"a": "/one"}, 5)
        await registry.install(gang)
        await registry.load("b", "/two")
        await registry.unload("a")
        successor = AdapterRegistry({"a": "/one"}, lambda: [gang])
        successor.resume(gang.kept)
        await successor.configure({"a": "/one"}, 5)
        assert [adapter.name for adapter in successor.all] == ["b"]
        await successor.configure({"a": "/two"}, 6)
        assert {adapter.name: adapter.path for adapter in successor.all} == {"a": "/two", "b": "/two"}
        await successor.configure({}, 7)
        assert [adapter.name for adapter in successor.all] == ["b"]

    run(test)


def test_a_change_waits_until_all_front_ends_have_it() -> None:
    async def test() -> None:
        now_s = 0.0
        watchers = Watchers(lambda: now_s)
        watchers.note("a", 1)
        watchers.note("b", 2)
        waiting = asyncio.create_task(watchers.until_at(2, 30))
        await asyncio.sleep(0)
        assert not waiting.done()
        watchers.note("a", 3)
        assert await waiting
        assert not await watchers.until_at(4, 0.01)
        now_s = 100.0
        assert await watchers.until_at(4, 0.01), "they have not been heard of for long"

    run(test)
