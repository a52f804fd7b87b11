"""`TrialService`: `tensorweave serve` in processes of its own, all of which have ended at the end."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from tensorweave.cli.arguments import bearer
from tensorweave.cli.process_tree import ProcessTree
from tensorweave.cli.trial_load import FrontEnds
from tensorweave.deploy.api_keys import digest_of
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.tiny_model import TINY_MODEL, write_tiny_model

_POLL_S: Final = 0.25
_PROBE_TIMEOUT_S: Final = 30.0
_TELL_TIMEOUT_S: Final = 60.0
_STOP_SLACK_S: Final = 90.0
_LINGER_S: Final = 60.0
_KEPT_LINES: Final = 25


@dataclass(frozen=True, slots=True)
class Trial:
    """A service that can be started: what `tensorweave serve` is called with, the key that its clients send, and the
    key of its admin port."""

    config: ServeConfig
    arguments: Sequence[str]
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)


@contextlib.contextmanager
def prepared_trial(path: Path, changes: Sequence[str], api_key: str | None) -> Iterator[Trial]:
    """If the configuration names the tiny model, create it, and remove it at the end of the context.

    Raises:
        ValueError: the configuration is wrong, is not for a Ray cluster of its own, or asks for another key.
    """
    config = load_config(path, changes)
    if config.ray.address is not None:
        raise ValueError("ray.address: a service on trial runs on a Ray cluster of its own; leave it out")
    _check_key(config, api_key)
    admin_key = secrets.token_hex(16)
    without_tls = ("router.tls=null", "admin.tls=null")  # its clients are here
    changes = [*changes, *without_tls, f"security.admin_keys=[{json.dumps(digest_of(admin_key))}]"]
    with tempfile.TemporaryDirectory(prefix="tensorweave-trial-") as directory:
        if config.model == TINY_MODEL:
            model = write_tiny_model(Path(directory) / TINY_MODEL)
            tiny = (f"model={json.dumps(str(model))}", f"served_model_name={json.dumps(config.model_names)}")
            changes = [*changes, *tiny]
        arguments = ["--config", str(path.resolve())]
        for change in changes:
            arguments += ["--set", change]
        yield Trial(load_config(path, changes), arguments, api_key, admin_key)


def _check_key(config: ServeConfig, api_key: str | None) -> None:
    keys = config.security.api_keys
    if keys and (api_key is None or digest_of(api_key) not in keys):
        raise ValueError("security.api_keys: the service asks for one of its keys; give one with --api-key")


class ServiceBroken(Exception):
    """The service did not start, did not recover, or did not end properly."""


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One rank of a ready gang, according to the admin port's `/health`."""

    role: str
    gang_id: str
    rank: int
    pid: int


class TrialService:
    """One run of the service, from `start` to `end`. Its last lines are kept; all are appended to `log`, if given."""

    def __init__(self, trial: Trial, tree: ProcessTree, log: Path | None = None) -> None:
        self.config = trial.config
        self.tree = tree
        self._trial = trial
        self._log = log
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._ready = asyncio.Event()
        self._is_stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def ports(self) -> list[int]:
        """The ports of the front ends."""
        router = self.config.router
        return list(range(router.port, router.port + router.replicas))

    def url(self, port: int) -> str:
        return f"http://{self.config.router.reachable_host}:{port}"

    def front_ends(self, timeout_s: float) -> FrontEnds:
        """The front ends, for clients with this request timeout."""
        return FrontEnds([self.url(port) for port in self.ports], timeout_s, self._trial.api_key)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # ---- start and end

    async def start(self) -> None:
        """Wait until the service is ready. Raises ServiceBroken with its last lines."""
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tensorweave.cli.main", "serve", *self._trial.arguments),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=2**20,
            start_new_session=True,  # a Ctrl-C reaches us alone, and we take the service down in order
        )
        self._reader = asyncio.create_task(self._read(self._process))
        ended = asyncio.create_task(self._process.wait())
        ready = asyncio.create_task(self._ready.wait())
        limit_s = self.config.limits.start_timeout_s + _STOP_SLACK_S
        try:
            await asyncio.wait({ended, ready}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not self._ready.is_set():
                raise ServiceBroken(f"the service did not start; its last lines:\n{self.last_lines()}")
        finally:
            ended.cancel()
            ready.cancel()
            self.tree.note(self.pid)

    def ask_to_stop(self) -> None:
        """Send SIGTERM, once: no new requests, running ones finish. A second SIGTERM would cancel them."""
        assert self._process is not None
        self.tree.note(self.pid)
        if self._process.returncode is None and not self._is_stopping:
            self._process.send_signal(signal.SIGTERM)
        self._is_stopping = True

    async def end(self) -> None:
        """Drain, and wait until all processes have ended. Raises ServiceBroken if the end is late or unclean; then the
        remaining processes are killed."""
        if self._process is None:
            return
        try:
            self.ask_to_stop()
            async with asyncio.timeout(self.config.limits.drain_timeout_s + _STOP_SLACK_S):
                code = await self._process.wait()
            left = await self._await_gone()
        except TimeoutError:
            raise ServiceBroken(f"the service did not end; its last lines:\n{self.last_lines()}") from None
        finally:
            self.tree.kill()
            await self._process.wait()
            if self._reader is not None:
                await self._reader
            self._process = None
        if code != 0 and self._ready.is_set():
            raise ServiceBroken(f"the service ended with code {code}; its last lines:\n{self.last_lines()}")
        if left:
            raise ServiceBroken(f"the service left processes behind: {', '.join(left)}")

    async def _await_gone(self) -> list[str]:
        """The names of the processes that still run after a grace period."""
        await asyncio.to_thread(psutil.wait_procs, self.tree.living(), _LINGER_S)
        return [_name(process) for process in self.tree.living()]

    def last_lines(self) -> str:
        return "\n".join(f"    {line}" for line in self._lines)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with contextlib.ExitStack() as closing:
            log = None if self._log is None else closing.enter_context(self._log.open("a", encoding="utf-8"))
            async for raw in process.stderr:
                line = raw.decode(errors="replace").rstrip("\n")
                self._lines.append(line)
                if log is not None:
                    print(line, file=log, flush=True)
                if "ready: " in line:
                    self._ready.set()

    # ---- health and metrics

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=_PROBE_TIMEOUT_S, headers=bearer(self._trial.api_key))

    async def pools(self) -> list[dict[str, Any]]:
        """The pools according to the admin port; nothing if it does not answer."""
        admin = f"http://{self.config.admin.reachable_host}:{self.config.admin_port}"
        headers = bearer(self._trial.admin_key)
        async with httpx.AsyncClient(base_url=admin, timeout=_PROBE_TIMEOUT_S, headers=headers) as client:
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                pools: list[dict[str, Any]] = (await client.get("/health")).json()["pools"]
                return pools
        return []

    async def ranks(self) -> list[RankProcess]:
        """Every rank of every ready gang. Raises ServiceBroken if the admin port does not report them."""
        deadline_s = time.monotonic() + _TELL_TIMEOUT_S
        while not (pools := await self.pools()):
            if time.monotonic() > deadline_s:
                raise ServiceBroken("the admin port does not report the pools")
            await asyncio.sleep(_POLL_S)
        return list(_ranks(pools))

    async def gang_ids(self) -> set[str]:
        """The ids of the ready gangs. A gang's successor has another id."""
        return {rank.gang_id for rank in await self.ranks()}

    async def count(self, metric: str) -> float:
        """A counter of `/metrics`, over all front ends that answer and all labels."""
        return sum((await self.counts(metric)).values())

    async def counts(self, metric: str) -> dict[int, float]:
        """The same, by the front end's port."""
        found: dict[int, float] = {}
        async with self._client() as client:
            for port in self.ports:
                with contextlib.suppress(httpx.HTTPError):
                    text = (await client.get(f"{self.url(port)}/metrics")).text
                    rows = [line for line in text.splitlines() if line.startswith((f"{metric} ", f"{metric}{{"))]
                    found[port] = sum(float(row.rpartition(" ")[2]) for row in rows)
        return found

    async def await_recovery(self, gone: Collection[int], timeout_s: float) -> bool:
        """Wait until all gangs are ready, none of them with a rank in `gone`, and every front end is ready. Return
        False if a gang has failed for good. Raises ServiceBroken at the timeout."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            pools = await self.pools()
            self.tree.note(self.pid)
            if any(pool["failure"] or "failed" in _states(pool) for pool in pools):
                return False
            is_full = bool(pools) and all(_is_full(pool, gone) for pool in pools)
            if is_full and await self._are_all_ready():
                return True
            if time.monotonic() > deadline_s:
                raise ServiceBroken(f"the service did not recover within {timeout_s:g} s: {_describe(pools)}")
            await asyncio.sleep(_POLL_S)

    async def _are_all_ready(self) -> bool:
        async with self._client() as client:
            try:
                answers = [await client.get(f"{self.url(port)}/ready") for port in self.ports]
            except httpx.HTTPError:
                return False
        return all(answer.status_code == 200 for answer in answers)


def _ranks(pools: Sequence[dict[str, Any]]) -> Iterator[RankProcess]:
    for pool in pools:
        for gang in pool["gangs"]:
            if gang["state"] == "ready":
                for rank in gang["ranks"]:
                    yield RankProcess(pool["role"], gang["gang_id"], rank["rank"], rank["pid"])


def _states(pool: dict[str, Any]) -> list[str]:
    return [gang["state"] for gang in pool["gangs"]]


def _is_full(pool: dict[str, Any], gone: Collection[int]) -> bool:
    ready = [gang for gang in pool["gangs"] if gang["state"] == "ready"]
    pids = {rank["pid"] for gang in ready for rank in gang["ranks"]}
    return len(ready) == pool["replicas"] and not pids & set(gone)


def _describe(pools: Sequence[dict[str, Any]]) -> str:
    states = [f"{pool['pool']}: {', '.join(_states(pool))}" for pool in pools]
    return "; ".join(states) or "the admin port does not answer"


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.name()} ({process.pid})"
    return str(process.pid)
