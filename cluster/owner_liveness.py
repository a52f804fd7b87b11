"""`Lifeline`: an actor that lives exactly as long as the process that started it, so that others can end with that
process.

Ray ends an actor with its owner, but a placement group with its job, unless a detached actor made it: then with that
one (2.60: `creator_actor_dead and creator_job_dead`, where a detached creator's job counts as dead). So a supervisor,
which makes its gangs' groups, is detached, and ends itself when its owner's lifeline has ended.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from typing import Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

_NAMESPACE: Final = "tensorweave"
_RESTART_WAIT_S: Final = 1.0


class Lifeline:
    """The actor; `OwnLifeline` starts it and keeps its handle."""

    async def hold(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()


class OwnLifeline:
    """The lifeline of this process. Others find it by its `name`: a handle among the arguments of an actor that may be
    restarted would be an object that can be lost."""

    def __init__(self) -> None:
        self.name = f"tensorweave-lifeline-{secrets.token_hex(8)}"
        # On this node: another one may be lost while this process lives on.
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: ActorHandle[Lifeline] = (
            ray.remote(Lifeline)
            .options(name=self.name, namespace=_NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=strategy)
            .remote()
        )

    def end(self) -> None:
        """What hangs on it ends too."""
        ray.kill(self._actor, no_restart=True)


def end_with(name: str) -> None:
    """For an actor's constructor: the actor ends when the lifeline of this name has ended, and is not restarted. What
    it owns ends with it. On a thread: one that is restarted when its owner has gone already is never called."""
    myself = ray.get_runtime_context().current_actor

    def wait() -> None:
        wait_for_end(name)
        logger.info("the process that started this actor is gone: ending")
        ray.kill(myself, no_restart=True)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def wait_for_end(name: str) -> None:
    """As long as the owner lives. A lifeline whose own process failed is restarted, and asked again."""
    while True:
        try:
            lifeline: ActorHandle[Lifeline] = ray.get_actor(name, namespace=_NAMESPACE)
            lifeline.hold.remote().future().result()
        except (ActorDiedError, ValueError):  # ValueError: there is no such actor any more
            return
        except RayError:
            threading.Event().wait(_RESTART_WAIT_S)
