"""`RankStore`: a gang's rendezvous store behind the interface that torch.distributed asks for."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import msgpack
from torch.distributed import Store  # type: ignore[attr-defined]

from tensorweave.workers.gang.rendezvous import CallStore

Exchange: TypeAlias = Callable[[bytes], Sequence[bytes]]
"""Returns each rank's message on every rank. It must need the interpreter of no other rank."""


class RankStore(Store):
    """Torch calls these methods by name, from threads of its own.

    Every wait ends after `timeout_s`, whatever torch asks for: a group that has not formed by then never will. After
    `seal` nothing is sent to rank 0 any more: NCCL's monitor would call every second as long as the group lives.
    """

    def __init__(self, call: CallStore, timeout_s: float) -> None:
        super().__init__()
        self._call = call
        self._timeout_s = float(timeout_s)
        self._is_sealed = False
        self._exchanged: ExchangedKeys | None = None

    def seal(self) -> None:
        """The group has formed."""
        self._is_sealed = True

    @contextlib.contextmanager
    def exchanging(self, exchange: Exchange) -> Iterator[None]:
        """Inside the block, this thread's keys go through `exchange`, not through rank 0.

        Torch's rendezvous of symmetric memory keeps the interpreter locked while it waits in C++ for another rank. Were
        that rank to ask rank 0 for a key meanwhile, both would wait for ever.
        """
        self._exchanged = ExchangedKeys(exchange)
        try:
            yield
        finally:
            self._exchanged = None

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # bytes is what torch's C++ gives
        if (exchanged := self._exchanged_here()) is not None:
            exchanged.set(key, bytes(value))
        elif not self._is_sealed:
            self._call("set", key, bytes(value))

    def get(self, key: str) -> bytes:
        if (exchanged := self._exchanged_here()) is not None:
            return exchanged.get(key)
        value: bytes = self._call("get", key, self._timeout_s)
        return value

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        if (exchanged := self._exchanged_here()) is not None:
            for key in keys:
                exchanged.get(key)
            return
        self._call("wait", list(keys), self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        return int(self._call("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return not self._is_sealed and bool(self._call("has", list(keys)))

    def delete_key(self, key: str) -> bool:
        return bool(self._call("delete", key))

    def clone(self) -> RankStore:
        return self

    def _exchanged_here(self) -> ExchangedKeys | None:
        exchanged = self._exchanged
        return exchanged if exchanged is not None and exchanged.thread == threading.get_ident() else None


class ExchangedKeys:
    """Keys of ranks that each set one at the same time and then read those of the others, as torch's exchanges do."""

    def __init__(self, exchange: Exchange) -> None:
        self.thread = threading.get_ident()
        self._exchange = exchange
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        """Every rank calls it; return once all have."""
        for message in self._exchange(msgpack.packb([key, value])):
            name, told = msgpack.unpackb(message)
            self._values[name] = told

    def get(self, key: str) -> bytes:
        """Raises RuntimeError if no rank has set the key: torch then exchanges in another way."""
        if key not in self._values:
            raise RuntimeError(f"torch reads {key!r} before its rank has set it")
        return self._values[key]
