"""The model that a service serves: found once where it is started, and then on every host anew.

A host is told the name and the revision, never a path of another host's cache, and a digest: one that has other weights
under that name is refused by its own ranks (`workers/rank.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tensorweave.deploy.config import ServeConfig
from tensorweave.workers.engine_dir.model_digest import model_digest
from tensorweave.workers.store.model_store import pin_model


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`config` names the model as every host must look for it; `digests` are what its pools' ranks must find."""

    config: ServeConfig
    digests: dict[str, str]

    @classmethod
    def find(cls, config: ServeConfig) -> Self:
        """On this host; a model that is not here yet is fetched. Raises ValueError, ModelUnavailable."""
        pinned = pin_model(config.model, revision=config.shared_args.revision)
        digests = {name: model_digest(pinned.path, pool.load_format) for name, pool in config.pools.items()}
        return cls(config.with_model(pinned.name, pinned.revision), digests)
