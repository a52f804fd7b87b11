"""`SupervisorAdapters`: loads and unloads adapters for the admin port, through the supervisor."""

from __future__ import annotations

import functools
from typing import Final

from tensorweave.cluster.errors import ModelNotFound, RequestRejected
from tensorweave.cluster.protocol import Adapter
from tensorweave.deploy.supervisor_calls import FindSupervisor, call_supervisor

_TIMEOUT_S: Final = 180.0


class SupervisorAdapters:
    """Satisfies `router.admin.adapters.AdapterControl`."""

    def __init__(self, find_supervisor: FindSupervisor) -> None:
        self._find = find_supervisor

    async def load(self, name: str, path: str, *, is_new: bool) -> Adapter:
        refuse = functools.partial(RequestRejected, param="lora_name")
        adapter: Adapter = await call_supervisor(
            self._find, lambda found: found.load_adapter.remote(name, path, is_new=is_new), _TIMEOUT_S, refuse
        )
        return adapter

    async def unload(self, name: str) -> None:
        refuse = functools.partial(ModelNotFound, param="lora_name")
        await call_supervisor(self._find, lambda found: found.unload_adapter.remote(name), _TIMEOUT_S, refuse)
