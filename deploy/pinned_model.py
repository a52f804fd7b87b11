"""The model of a service: resolved once where the service is started, then looked up on every host.

Each host gets the name and the revision, never a path of another host's cache, and a digest: if it has other weights
under that name, its ranks refuse to load them (`workers/rank.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tensorweave.deploy.config import ServeConfig
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.store.model_store import pin_model


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """`config` names the model as every host must look it up; `digests`, by pool, are those of the expected files."""

    config: ServeConfig
    digests: dict[str, str]

    @classmethod
    def find(cls, config: ServeConfig) -> Self:
        """Resolve the model on this host, fetching it if needed. Raises ValueError, ModelUnavailable."""
        pinned = pin_model(config.model, revision=config.shared_args.revision)
        digests = {name: model_digest(pinned.path, pool.load_format) for name, pool in config.pools.items()}
        return cls(config.with_model(pinned.name, pinned.revision), digests)
