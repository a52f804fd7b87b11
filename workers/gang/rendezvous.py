"""How the ranks of a gang find each other: `Board`, what they tell each other while their group forms, and `RankStore`,
the same as torch's `Store`.

The board is rank 0's, and the others reach it by Ray's calls, which carry the cluster's token: no port is opened for it
that a stranger could read, write or fill. It is of no use once the group stands.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from torch.distributed import Store  # type: ignore[attr-defined]

Ask: TypeAlias = Callable[..., Any]
"""`ask(verb, *arguments)` does on the board what `Board.answer` says, from any thread; it waits for the answer."""

_SLACK_S: Final = 10.0


class Board:
    """Keys and values; one event loop's."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = asyncio.Event()

    async def answer(self, verb: str, *arguments: Any) -> Any:
        """`set key value` · `get key timeout_s` · `wait keys timeout_s` · `add key amount` · `has keys` · `delete key`.
        Raises TimeoutError where a key does not come in time."""
        match verb, arguments:
            case "set", (str(key), bytes(value)):
                self._put(key, value)
            case "get", (str(key), float(timeout_s)):
                await self._until_all([key], timeout_s)
                return self._values[key]
            case "wait", (list(keys), float(timeout_s)):
                await self._until_all(keys, timeout_s)
            case "add", (str(key), int(amount)):
                total = int(self._values.get(key, b"0")) + amount
                self._put(key, str(total).encode())
                return total
            case "has", (list(keys),):
                return all(key in self._values for key in keys)
            case "delete", (str(key),):
                return self._values.pop(key, None) is not None
            case _:
                raise AssertionError(f"a board has no {verb!r} of {len(arguments)} arguments")
        return None

    def _put(self, key: str, value: bytes) -> None:
        self._values[key] = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until_all(self, keys: Sequence[str], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not all(key in self._values for key in keys):
                    await self._changed.wait()
        except TimeoutError:
            missing = [key for key in keys if key not in self._values]
            raise TimeoutError(f"no rank has told {', '.join(missing)} within {timeout_s:g} s") from None


def ask_on_loop(board: Board, loop: asyncio.AbstractEventLoop, timeout_s: float) -> Ask:
    """Rank 0's way to its own board, from any thread but the loop's."""

    def ask(verb: str, *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(board.answer(verb, *arguments), loop).result(timeout_s + _SLACK_S)

    return ask


class RankStore(Store):
    """torch calls these methods by their names, from threads of its own. Each wait ends after `timeout_s`, whatever
    torch asks for: a group that does not form in time never does.

    Sealed, it asks the board no more: NCCL's monitor would, each second, for as long as the group lives.
    """

    def __init__(self, ask: Ask, timeout_s: float) -> None:
        super().__init__()
        self._ask = ask
        self._timeout_s = float(timeout_s)
        self._is_sealed = False

    def seal(self) -> None:
        """The group stands."""
        self._is_sealed = True

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # bytes is what torch's C++ gives
        if not self._is_sealed:
            self._ask("set", key, bytes(value))

    def get(self, key: str) -> bytes:
        value: bytes = self._ask("get", key, self._timeout_s)
        return value

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._ask("wait", list(keys), self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return not self._is_sealed and bool(self._ask("has", list(keys)))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask("delete", key))

    def clone(self) -> RankStore:
        return self
