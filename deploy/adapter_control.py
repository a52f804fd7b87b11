"""`SupervisorAdapters`: loads and unloads adapters for the admin port, through the supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from ray.actor import ActorHandle
from ray.exceptions import RayError

from tensorweave.cluster.errors import ModelNotFound, NotReady, RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import Adapter

_TIMEOUT_S: Final = 180.0


class SupervisorAdapters:
    """Satisfies `router.admin.adapters.AdapterControl`. `find_supervisor` blocks, and raises ValueError if there is
    none."""

    def __init__(self, find_supervisor: Callable[[], ActorHandle[Any]]) -> None:
        self._find_supervisor = find_supervisor

    async def load(self, name: str, path: str, *, is_new: bool) -> Adapter:
        adapter: Adapter = await self._call(
            RequestRejected, lambda found: found.load_adapter.remote(name, path, is_new=is_new)
        )
        return adapter

    async def unload(self, name: str) -> None:
        await self._call(ModelNotFound, lambda found: found.unload_adapter.remote(name))

    async def _call(self, refusal: type[RequestRejected], call: Callable[[ActorHandle[Any]], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                try:
                    supervisor = await asyncio.to_thread(self._find_supervisor)
                except ValueError:
                    raise NotReady("there is no supervisor yet", retry_after_s=5.0) from None
                return await call(supervisor)
        except TimeoutError:
            raise NotReady(f"not all gangs have followed within {_TIMEOUT_S:g} s") from None
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, TensorweaveError) and not isinstance(cause, RequestRejected):
                raise cause from error
            if isinstance(cause, ValueError):
                raise refusal(str(cause), param="lora_name") from error
            raise NotReady(f"the supervisor does not answer: {type(error).__name__}") from error
