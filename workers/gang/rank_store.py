"""`RankStore`: a gang's rendezvous store behind the interface that torch.distributed asks for."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

from torch.distributed import Store  # type: ignore[attr-defined]

from tensorweave.workers.gang.rendezvous import CallStore


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

    def seal(self) -> None:
        """The group has formed."""
        self._is_sealed = True

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Not sealed inside the block, in which ranks exchange more."""
        was_sealed, self._is_sealed = self._is_sealed, False
        try:
            yield
        finally:
            self._is_sealed = was_sealed

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # bytes is what torch's C++ gives
        if not self._is_sealed:
            self._call("set", key, bytes(value))

    def get(self, key: str) -> bytes:
        value: bytes = self._call("get", key, self._timeout_s)
        return value

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._call("wait", list(keys), self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        return int(self._call("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return not self._is_sealed and bool(self._call("has", list(keys)))

    def delete_key(self, key: str) -> bool:
        return bool(self._call("delete", key))

    def clone(self) -> RankStore:
        return self
