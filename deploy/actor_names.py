"""The names of a service's actors, their namespace, and the node that they run on."""

from __future__ import annotations

from typing import Final

from tensorweave.cluster.service_state import DetachedSpec

APP_NAME: Final = "tensorweave"
SERVICE_ACTOR_NAME: Final = "tensorweave-service"
NAMESPACE: Final = "tensorweave"
HEAD_NODE: Final = {"node:__internal_head__": 0.001}


def supervisor_home(app_name: str) -> DetachedSpec:
    """Where the supervisor of this Serve application's gangs is: on the head node, beside Ray's own controllers."""
    return DetachedSpec(f"pools-{app_name}", NAMESPACE, HEAD_NODE)
