"""Where on a Ray cluster a service lives: names, namespace, the head node."""

from __future__ import annotations

from typing import Final

from tensorweave.cluster.supervisor import Home

APP_NAME: Final = "tensorweave"
GUARDIAN_NAME: Final = "tensorweave-guardian"
NAMESPACE: Final = "tensorweave"
HEAD_NODE: Final = {"node:__internal_head__": 0.001}


def supervisor_home(app_name: str) -> Home:
    """Of the gangs of this Serve application: beside Ray's own controllers, which nothing of ours outlives."""
    return Home(f"pools-{app_name}", NAMESPACE, HEAD_NODE)
