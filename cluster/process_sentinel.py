"""`ProcessSentinel`: an actor that lives exactly as long as the process that started it, so that other actors can end
with that process.

Ray ends an actor with its owner. It ends a placement group with its job, or, if a detached actor created the group,
with that actor (2.60: `creator_actor_dead and creator_job_dead`, where a detached creator's job counts as dead). So a
supervisor, which creates its gangs' groups, is detached, and ends itself once its owner's sentinel has ended."""

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


class ProcessSentinel:
    """The actor. `OwnSentinel` starts it and keeps its handle."""

    async def wait(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()


class OwnSentinel:
    """The sentinel of this process. Other actors find it by its `name`: a handle among the arguments of an actor that
    may be restarted would be an object that can be lost."""

    def __init__(self) -> None:
        self.name = f"tensorweave-sentinel-{secrets.token_hex(8)}"
        # On this node: another one may be lost while this process lives on.
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: ActorHandle[ProcessSentinel] = (
            ray.remote(ProcessSentinel)
            .options(name=self.name, namespace=_NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=strategy)
            .remote()
        )

    def end(self) -> None:
        """End the sentinel, and the actors that follow it."""
        ray.kill(self._actor, no_restart=True)


def end_actor_with(name: str) -> None:
    """For an actor's constructor: end this actor, without a restart, when the sentinel of this name has ended. What the
    actor owns ends with it. The sentinel is awaited on a thread, because nobody calls an actor that is restarted after
    its owner has ended."""
    this_actor = ray.get_runtime_context().current_actor

    def wait() -> None:
        wait_for_owner_end(name)
        logger.info("the process that started this actor has ended: ending")
        ray.kill(this_actor, no_restart=True)

    threading.Thread(target=wait, name="sentinel", daemon=True).start()


def wait_for_owner_end(name: str) -> None:
    """Wait until the owner of this sentinel has ended. A sentinel whose own process failed is restarted, and awaited
    again."""
    while True:
        try:
            sentinel: ActorHandle[ProcessSentinel] = ray.get_actor(name, namespace=_NAMESPACE)
            sentinel.wait.remote().future().result()
        except (ActorDiedError, ValueError):  # ValueError: there is no such actor any more
            return
        except RayError:
            threading.Event().wait(_RESTART_WAIT_S)
