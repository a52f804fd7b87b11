"""`ServeConfig`: the configuration of a service, the same for `tensorweave serve`, `serve run`, `ray job submit` and
Slurm.

`load_config` makes it from a YAML file and `--set` overrides, or raises a `ConfigError` with one line per mistake: file
and line, key, value, remedy. `engine` has the engine arguments that all pools share; a pool's own keys override them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self, get_args

from pydantic import ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from tensorweave.cluster.llm_args import LlmArgs, adapter_config
from tensorweave.cluster.protocol import Role
from tensorweave.cluster.strict_model import Field, StrictBaseModel, mistake
from tensorweave.deploy.config_access import AdminConfig, SecurityConfig
from tensorweave.deploy.config_file import ConfigError, KeyPath, read_document
from tensorweave.deploy.config_mistakes import describe
from tensorweave.deploy.config_observing import LoggingConfig, TracingConfig
from tensorweave.deploy.config_router import RouterConfig
from tensorweave.deploy.config_scaling import ScalingConfig, obstacle_to_moves
from tensorweave.deploy.config_tables import LimitsConfig, NetworkConfig, PoolConfig, RayConfig

# The router tokenizes and completes sampling fields for all pools, so these cannot differ between pools: the model is
# given at the top, the others under `engine`.
_SHARED_KEYS: Final = (
    "tokenizer",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "trust_remote_code",
    "revision",
    "tokenizer_revision",
    "generation_config",
    "guided_decoding_backend",
    "reasoning_parser",
    "tool_parser",
)
_FIRST_REVISION: Final = "main"
_ADMIN_OFFSET: Final = 200
_NOT_IN_ENGINE: Final = ("model", "role", "replicas", "min_replicas", "max_replicas")
_NOT_IN_POOL: Final = ("model", *_SHARED_KEYS)


class ServeConfig(StrictBaseModel):
    """A whole service."""

    model: str = Field(
        status="prototype", min_length=1, description="A Hugging Face model directory, a hub id, or a known short name."
    )
    served_model_name: str | list[str] | None = Field(
        None,
        status="prototype",
        description="Name that clients use, or several: answers and metrics show the first. Default: the last part of "
        "`model`.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, status="prototype", description="LlmArgs that all pools share."
    )
    pools: dict[str, PoolConfig] = Field(
        status="prototype", min_length=1, description="Pools by name. Default: one, 'main'."
    )
    adapters: dict[str, str] = Field(
        default_factory=dict,
        status="prototype",
        description="LoRA adapters: directories in PEFT's form, on every rank's host, by the names that clients use as "
        "models. Needs engine.enable_lora.",
    )
    router: RouterConfig = Field(default_factory=RouterConfig, status="prototype", description="The HTTP front end.")
    admin: AdminConfig = Field(default_factory=AdminConfig, status="prototype", description="The port for operators.")
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, status="prototype", description="What its processes write to their log."
    )
    tracing: TracingConfig = Field(
        default_factory=TracingConfig, status="prototype", description="OpenTelemetry traces of requests."
    )
    limits: LimitsConfig = Field(default_factory=LimitsConfig, status="prototype", description="Bounds and deadlines.")
    security: SecurityConfig = Field(
        default_factory=SecurityConfig, status="prototype", description="What clients may do."
    )
    network: NetworkConfig = Field(
        default_factory=NetworkConfig, status="prototype", description="Which of the hosts' networks is used for what."
    )
    scaling: ScalingConfig = Field(
        default_factory=ScalingConfig, status="prototype", description="When pools change while the service runs."
    )
    ray: RayConfig = Field(default_factory=RayConfig, status="prototype", description="The Ray cluster.")

    @classmethod
    def _hint(cls, key: str) -> str:
        return f"; did you mean 'engine.{key}'?" if key in LlmArgs.model_fields else super()._hint(key)

    @field_validator("served_model_name", mode="before")
    @classmethod
    def _check_names(cls, names: object) -> object:
        if names is None or isinstance(names, str):
            return names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("must be a name or a list of names")
        if not names or not all(names):
            raise ValueError("a list of names has at least one, and none that is empty")
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"{twice[0]!r} is in the list twice")
        return names

    @classmethod
    def _sift(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """Give each pool the keys of `engine`."""
        kept, mistakes = super()._sift(data)
        engine, pools = kept.get("engine") or {}, kept.get("pools") or {"main": {}}
        if not isinstance(pools, dict):
            return kept, mistakes
        shared, misplaced = _split_keys(("engine",), engine if isinstance(engine, dict) else {}, _NOT_IN_ENGINE)
        mistakes += misplaced
        merged = {}
        for name, pool in pools.items():
            if isinstance(pool, PoolConfig):
                pool = pool.model_dump()
            elif isinstance(pool, dict) or pool is None:
                own, misplaced = _split_keys(("pools", str(name)), pool or {}, _NOT_IN_POOL)
                mistakes += misplaced
                pool = _merge(shared, own)
                _assign_role(str(name), pool)
            merged[name] = pool
        return {**kept, "engine": engine, "pools": merged}, mistakes

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        for name, path in self.adapters.items():
            if not name or name in self.model_names:
                raise ValueError(f"adapters has {name!r}, which is the name of the model, or none")
            if not path:
                raise ValueError(f"adapter {name!r} has no directory")
        if self.adapters and any(adapter_config(pool) is None for pool in self.pools.values() if pool.role != "embed"):
            raise ValueError("adapters need engine.enable_lora: true in every pool")
        self.adapters = {name: str(Path(path).expanduser().absolute()) for name, path in self.adapters.items()}
        return self

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        for pool in self.pools.values():
            pool.model = self.model
        mistakes = [*self._wrong_roles(), *self._wrong_exchange(), *self._wrong_admin()]
        if self.scaling.moves and (reason := obstacle_to_moves(self.pools)):
            mistakes.append(_wrong(("scaling", "moves"), reason))
        if mistakes:
            raise ValidationError.from_exception_data(type(self).__name__, mistakes)
        return self

    @property
    def admin_port(self) -> int:
        return self.admin.port or self.router.port + _ADMIN_OFFSET

    @property
    def endpoint(self) -> str:
        """The address of the first router replica, or the one that was given for it."""
        return self.admin.endpoint or f"{self.router.scheme}://{self.router.reachable_host}:{self.router.port}"

    def _wrong_roles(self) -> Iterator[InitErrorDetails]:
        by_role = {role: [name for name, pool in self.pools.items() if pool.role == role] for role in get_args(Role)}
        if by_role["both"] and len(self.pools) - len(by_role["embed"]) > 1:
            name = by_role["both"][0]
            yield _wrong_pool(
                (name, "role"), f"pool {name!r} of role 'both' must be the only pool; for more of it, 'replicas'"
            )
            return
        for name in by_role["embed"]:
            if self.pools[name].device == "cuda":
                yield _wrong_pool((name, "device"), "embeddings are for CPUs so far: set device to 'cpu'")
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            if by_role[role] and not by_role[other]:
                name = by_role[role][0]
                yield _wrong_pool((name,), f"a pool of role {role!r} needs one of role {other!r} (or make it 'both')")

    def _wrong_exchange(self) -> Iterator[InitErrorDetails]:
        """Gangs that exchange KV need it in the same form."""
        exchanging = {name: pool for name, pool in self.pools.items() if pool.role in ("prefill", "decode")}
        first = next(iter(exchanging), "")
        for key in (("dtype",), ("kv_cache_config", "tokens_per_block")):
            for name, pool in exchanging.items():
                mine, theirs = _knob(exchanging[first], key), _knob(pool, key)
                if mine != theirs:
                    wanted = f"pools that exchange KV need the same {'.'.join(key)}"
                    found = f"that of pool {first!r} is {mine!r}, here it is {theirs!r}"
                    yield _wrong_pool((name, *key), f"{wanted}; {found}")
        for name, pool in exchanging.items():
            if pool.cache_transceiver_config is None or pool.cache_transceiver_config.backend is None:
                path = (name, "cache_transceiver_config", "backend")
                yield _wrong_pool(path, f"a {pool.role} pool needs a backend, 'DEFAULT' for one")

    def _wrong_admin(self) -> Iterator[InitErrorDetails]:
        router, port = self.router, self.admin_port
        if port > 65535:
            yield _wrong(("admin", "port"), f"would be {port}, which is router.port + {_ADMIN_OFFSET}: set it")
        if port == router.proxy_port or router.port <= port < router.port + router.replicas:
            yield _wrong(("admin", "port"), f"is {port}, which is one of the router's ports")
        if not self.admin.is_loopback and not self.security.admin_keys:
            remedy = "set security.admin_keys, or leave it at 127.0.0.1"
            yield _wrong(("admin", "host"), f"others can reach {self.admin.host!r}: {remedy}")

    @property
    def model_names(self) -> list[str]:
        """The names by which clients may request the model."""
        names = self.served_model_name or Path(self.model).name or self.model
        return [names] if isinstance(names, str) else list(names)

    @property
    def model_name(self) -> str:
        """The model's name in answers."""
        return self.model_names[0]

    @property
    def shared_args(self) -> LlmArgs:
        """The engine arguments that the router reads; model and tokenizer are the same in every pool."""
        return next(iter(self.pools.values())).llm_args()

    def with_model(self, model: str, revision: str | None = None) -> ServeConfig:
        """The same service with `model` and `revision` as every host must look them up. The names for clients stay, and
        a tokenizer from another source keeps its own revision."""
        changes: dict[str, Any] = {"model": model, "revision": revision}
        if self.shared_args.tokenizer is not None and self.shared_args.tokenizer_revision is None:
            changes["tokenizer_revision"] = self.shared_args.revision or _FIRST_REVISION
        pools = {name: pool.model_copy(update=changes) for name, pool in self.pools.items()}
        return self.model_copy(update={"model": model, "served_model_name": self.model_names, "pools": pools})

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready data, from which `from_plain` rebuilds the same configuration in another process."""
        return self.model_dump(mode="json")

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> ServeConfig:
        pools = {name: PoolConfig(**pool) for name, pool in data["pools"].items()}
        return cls(**{**data, "pools": pools})


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> ServeConfig:
    """Read a service's YAML file and apply `overrides` ("limits.max_queued=10").

    Raises:
        ConfigError: The file has mistakes; its message has one line for each.
    """
    document = read_document(path, overrides)
    try:
        config = ServeConfig.model_validate(document.data)
    except ValidationError as error:
        lines = [describe(document, item) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys([*document.mistakes, *lines]))) from None
    document.checked()
    return config


def _assign_role(name: str, pool: dict[str, Any]) -> None:
    """Set the defaults that follow from a pool's name and role."""
    role = pool.setdefault("role", name if name in ("prefill", "decode", "embed") else "both")
    if role in ("prefill", "decode"):
        transceiver = pool.setdefault("cache_transceiver_config", {})
        if isinstance(transceiver, dict):
            pool["cache_transceiver_config"] = {"backend": "DEFAULT", **transceiver}


def _wrong_pool(path: KeyPath, message: str) -> InitErrorDetails:
    return _wrong(("pools", *path), message)


def _wrong(path: KeyPath, message: str) -> InitErrorDetails:
    return mistake(PydanticCustomError("service", "{message}", {"message": message, "path": path}), None)


def _knob(pool: PoolConfig, key: KeyPath) -> Any:
    value: Any = pool
    for name in key:
        value = getattr(value, name)
    return value


def _split_keys(
    table: KeyPath, keys: Mapping[str, Any], misplaced: Collection[str]
) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """The keys that are allowed in this table, and a mistake for each other one."""
    mistakes = [_misplaced((*table, key), value) for key, value in keys.items() if key in misplaced]
    return {key: value for key, value in keys.items() if key not in misplaced}, mistakes


def _misplaced(path: KeyPath, value: Any) -> InitErrorDetails:
    key = path[-1]
    place = "at the top of the file" if key == "model" else "under 'engine'" if key in _SHARED_KEYS else "under a pool"
    context = {"key": key, "place": place, "path": path}
    return mistake(PydanticCustomError("misplaced", "'{key}' belongs {place}", context), value)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` merged over `below`, group by group."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
