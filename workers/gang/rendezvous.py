"""`RendezvousStore`: a key-value store on rank 0 by which the ranks of a gang exchange addresses as their group forms.

The other ranks reach it by Ray calls, which carry the cluster's token, so that no port is opened for it. It is not used
once the group has formed. No torch here: `rank_store` is torch's view of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

CallStore: TypeAlias = Callable[..., Any]
"""`call(verb, *arguments)` is `RendezvousStore.call` on rank 0, from any thread; it waits for the result."""

_SLACK_S: Final = 10.0


class RendezvousStore:
    """Keys and values of one gang, used from one event loop."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = asyncio.Event()

    async def call(self, verb: str, *arguments: Any) -> Any:
        """`set key value` · `get key timeout_s` · `wait keys timeout_s` · `add key amount` · `has keys` · `delete key`.

        Raises:
            TimeoutError: a key was not set in time.
        """
        match verb, arguments:
            case "set", (str(key), bytes(value)):
                self._put(key, value)
            case "get", (str(key), float(timeout_s)):
                await self._wait_for([key], timeout_s)
                return self._values[key]
            case "wait", (list(keys), float(timeout_s)):
                await self._wait_for(keys, timeout_s)
            case "add", (str(key), int(amount)):
                total = int(self._values.get(key, b"0")) + amount
                self._put(key, str(total).encode())
                return total
            case "has", (list(keys),):
                return all(key in self._values for key in keys)
            case "delete", (str(key),):
                return self._values.pop(key, None) is not None
            case _:
                raise AssertionError(f"a rendezvous store has no {verb!r} of {len(arguments)} arguments")
        return None

    def _put(self, key: str, value: bytes) -> None:
        self._values[key] = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for(self, keys: Sequence[str], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not all(key in self._values for key in keys):
                    await self._changed.wait()
        except TimeoutError:
            missing = [key for key in keys if key not in self._values]
            raise TimeoutError(f"no rank has told {', '.join(missing)} within {timeout_s:g} s") from None


def call_on_loop(store: RendezvousStore, loop: asyncio.AbstractEventLoop, timeout_s: float) -> CallStore:
    """How rank 0 calls its own store, from any thread but the loop's."""

    def call(verb: str, *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(store.call(verb, *arguments), loop).result(timeout_s + _SLACK_S)

    return call
