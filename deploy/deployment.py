"""`Deployment`: the configuration that holds now, and what of it may change while the service runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ray.actor import ActorHandle

from tensorweave.cluster.pool_spec import PoolPlan, PoolSpec
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.pinned_model import PinnedModel
from tensorweave.deploy.pools import pool_specs
from tensorweave.workers.store.model_store import resolve_model

_CHANGEABLE: Final = ("model", "engine", "pools", "adapters", "scaling", "network", "limits", "ray")
_CHANGEABLE_LIMITS: Final = ("start_timeout_s", "place_timeout_s", "drain_timeout_s")
_OF_ROUTERS: Final = (
    *("tokenizer", "tokenizer_mode", "trust_remote_code", "tokenizer_revision"),
    *("reasoning_parser", "tool_parser", "guided_decoding_backend"),
)
_TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True, slots=True)
class Deployment:
    """`config` names the model as every host looks it up. A later deployment has a higher `generation`."""

    config: ServeConfig
    specs: tuple[PoolSpec, ...]
    generation: int

    @classmethod
    def of(cls, model: PinnedModel, generation: int, *, has_gpus: bool) -> Self:
        specs = pool_specs(model.config, has_gpus=has_gpus, digests=model.digests)
        return cls(model.config, tuple(specs), generation)

    def changed(self, plain: Mapping[str, Any], generation: int, *, has_gpus: bool) -> Deployment:
        """With a changed configuration, as plain data. Reads the model's files, and fetches it if needed. Raises
        ValueError if that needs a new start of the service, and ModelUnavailable."""
        wanted = ServeConfig.from_plain(plain)
        if fixed := list(_fixed_changes(self.config, wanted)):
            raise ValueError(f"{', '.join(fixed)} cannot change while it runs: start a new service, then stop this one")
        model = PinnedModel.find(wanted)
        check_tokenizer(self.config, model.config)
        return Deployment.of(model, generation, has_gpus=has_gpus)

    async def apply(self, supervisor: ActorHandle[Any], notice: str | None = None) -> PoolPlan:
        """Have the supervisor change to it. Return what holds now, which may be of a later deployment. `notice` is for
        health pages. Raises RayError."""
        config = self.config
        plan: PoolPlan = await supervisor.apply.remote(
            *(self.specs, self.generation, config.limits.drain_timeout_s, notice, config.adapters, config.to_plain())
        )
        return plan

    def resumed(self, generation: int, plain: Mapping[str, Any], specs: tuple[PoolSpec, ...]) -> Deployment:
        """What a later deployment has left, of which this process did not know."""
        return Deployment(ServeConfig.from_plain(plain), specs, generation)


def _fixed_changes(old: ServeConfig, new: ServeConfig) -> Iterator[str]:
    """What router replicas and the admin port have read once."""
    for table in type(old).model_fields:
        if table == "served_model_name":
            if old.model_names != new.model_names:
                yield "served_model_name"
        elif table not in _CHANGEABLE and getattr(old, table) != getattr(new, table):
            yield table
    limits = type(old.limits).model_fields.keys() - set(_CHANGEABLE_LIMITS)
    yield from sorted(f"limits.{key}" for key in limits if getattr(old.limits, key) != getattr(new.limits, key))
    for key in _OF_ROUTERS:
        if getattr(old.shared_args, key) != getattr(new.shared_args, key):
            yield f"engine.{key}"
    if _gives_embeddings(old) != _gives_embeddings(new):
        yield "pools of role 'embed'"


def _gives_embeddings(config: ServeConfig) -> tuple[bool, bool]:
    roles = {pool.role for pool in config.pools.values()}
    return "embed" in roles, roles == {"embed"}


def check_tokenizer(old: ServeConfig, new: ServeConfig) -> None:
    """Raises ValueError if the new model has another tokenizer or chat template: router replicas go on with the old
    one."""
    if new.shared_args.tokenizer is not None:
        return
    before, after = (_tokenizer_digests(config) for config in (old, new))
    if different := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ValueError(
            f"the new model's {', '.join(different)} differs from the served model's, which router replicas use: "
            "start a new service beside this one, then stop this one"
        )


def _tokenizer_digests(config: ServeConfig) -> dict[str, bytes]:
    path = Path(resolve_model(config.model, revision=config.shared_args.revision))
    if path.is_file():  # GGUF has all in one
        return {path.name: hashlib.sha256(path.read_bytes()).digest()}
    files = [path / name for name in _TOKENIZER_FILES]
    return {file.name: hashlib.sha256(file.read_bytes()).digest() for file in files if file.is_file()}
