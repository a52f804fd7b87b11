"""`AdapterRegistry`: the LoRA adapters of a service, which every gang has before it is ready.

Kept by the supervisor. `configured` ones are those of the service's file; others are loaded and unloaded while it runs.
The ranks read the files; only names, digests and paths are here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.errors import NotReady, TensorweaveError

logger = logging.getLogger(__name__)


class AdapterGang(Protocol):
    gang_id: str

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Raises ValueError if a rank refuses it, TensorweaveError if the gang is lost."""

    async def keep_adapters(self, record: AdapterRecord) -> None:
        """Let the gang keep this for a supervisor that takes it over."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """All that a supervisor knows of adapters. `configured` are paths by name, from the deployment of this
    `generation`; `loaded` are those that clients may name."""

    version: int = 0
    generation: int = 0
    configured: Mapping[str, str] = field(default_factory=dict)
    loaded: Mapping[str, Adapter] = field(default_factory=dict)


class AdapterRegistry:
    """Plain asyncio. `ready` gives the gangs that take requests; `on_change` is called after changes."""

    def __init__(
        self,
        configured: Mapping[str, str] | None = None,
        ready: Callable[[], Sequence[AdapterGang]] = lambda: (),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._record = AdapterRecord(configured=dict(configured or {}))
        self._ready = ready
        self._on_change = on_change
        self._loading = asyncio.Lock()

    @property
    def all(self) -> tuple[Adapter, ...]:
        return tuple(self._record.loaded.values())

    def resume(self, record: AdapterRecord) -> None:
        """Go on from what a gang has kept, if that is newer."""
        if record.version > self._record.version:
            self._record = record

    async def install(self, gang: AdapterGang) -> None:
        """Let a new gang load all adapters, also those that are added meanwhile.

        Raises:
            ValueError: it cannot load one of the configured ones, which no gang has loaded before. One that others
                have loaded is left out with a warning: the gang refuses requests with it.
        """
        done: set[tuple[str, str]] = set()
        while todo := [each for each in self._wanted() if each not in done]:
            for name, path in todo:
                done.add((name, path))
                try:
                    adapter = await gang.load_adapter(name, path)
                except ValueError as error:
                    if name not in self._record.loaded:
                        raise
                    logger.warning("gang %s has no adapter %r: %s", gang.gang_id, name, error)
                    continue
                if name not in self._record.loaded and self._record.configured.get(name) == path:
                    self._note({**self._record.loaded, name: adapter})
        if self._record.version:
            await gang.keep_adapters(self._record)

    async def load(self, name: str, path: str, *, is_new: bool = False) -> Adapter:
        """Load an adapter on every gang, in place of one of the same name, which requests that run go on with.

        Raises:
            ValueError: a rank refuses it, or, with `is_new`, there is one of this name. NotReady: no gang is ready.
        """
        async with self._loading:
            if is_new and name in self._record.loaded:
                raise ValueError(f"there is an adapter {name!r} already: unload it, or set load_inplace")
            adapter = await self._load_everywhere(name, path)
            self._note({**self._record.loaded, name: adapter})
        await self._keep()
        return adapter

    async def unload(self, name: str) -> None:
        """Requests that run go on with it. Raises ValueError if there is none."""
        async with self._loading:
            if name not in self._record.loaded:
                known = ", ".join(map(repr, self._record.loaded)) or "none"
                raise ValueError(f"there is no adapter {name!r}; there are: {known}")
            self._note({known: each for known, each in self._record.loaded.items() if known != name}, forget=name)
        await self._keep()

    async def configure(self, configured: Mapping[str, str], generation: int) -> None:
        """Change to the adapters of a later deployment's file: those that it adds or moves are loaded, those that it no
        longer has are unloaded, others stay."""
        if generation <= self._record.generation:
            return
        before, loaded = self._record.configured, self._record.loaded
        kept = {name: each for name, each in loaded.items() if name not in before or name in configured}
        self._record = AdapterRecord(self._record.version + 1, generation, dict(configured), kept)
        self._on_change()
        for name, path in configured.items():
            if before.get(name) != path and self._ready():
                try:
                    await self.load(name, path)
                except (ValueError, TensorweaveError) as error:
                    logger.error("adapter %r of the service's file was not loaded: %s", name, error)

    def _wanted(self) -> list[tuple[str, str]]:
        loaded = {name: each.path for name, each in self._record.loaded.items()}
        return list({**self._record.configured, **loaded}.items())

    async def _load_everywhere(self, name: str, path: str) -> Adapter:
        """Gangs that get ready meanwhile load it too; those that are lost do not count."""
        done: dict[str, Adapter] = {}
        tried: set[str] = set()
        while todo := [gang for gang in self._ready() if gang.gang_id not in tried]:
            tried |= {gang.gang_id for gang in todo}
            results: Sequence[Any] = await asyncio.gather(
                *(gang.load_adapter(name, path) for gang in todo), return_exceptions=True
            )
            for gang, result in zip(todo, results, strict=True):
                if isinstance(result, Adapter):
                    done[gang.gang_id] = result
                elif isinstance(result, ValueError) or not isinstance(result, TensorweaveError):
                    raise result
                else:
                    logger.warning("gang %s did not load adapter %r: %s", gang.gang_id, name, result.message)
        if not done:
            raise NotReady("no gang is ready to load an adapter", retry_after_s=5.0)
        if len({adapter.digest for adapter in done.values()}) > 1:
            raise ValueError(f"the gangs have read different files at {path}: it must be the same on all hosts")
        return next(iter(done.values()))

    def _note(self, loaded: Mapping[str, Adapter], forget: str | None = None) -> None:
        configured = {name: path for name, path in self._record.configured.items() if name != forget}
        self._record = AdapterRecord(self._record.version + 1, self._record.generation, configured, loaded)
        self._on_change()

    async def _keep(self) -> None:
        """On all gangs, for a supervisor that takes over."""
        calls = (gang.keep_adapters(self._record) for gang in self._ready())
        for error in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(error, BaseException):
                logger.warning("a gang has not kept the list of adapters: %s", error)
