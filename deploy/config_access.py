"""The tables of a service's configuration that say who may use it and for what: security, and the admin port."""

from __future__ import annotations

import ipaddress
import math
import re
from typing import Final, Self

from pydantic import field_validator, model_validator

from tensorweave.cluster.strict_model import Field, StrictBaseModel
from tensorweave.deploy.api_keys import digest_of, read_keys
from tensorweave.deploy.config_tls import ListenerTlsConfig

_ORIGIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@*]+")


class SecurityConfig(StrictBaseModel):
    """Who may use the service, and for what."""

    enable_disaggregated_params: bool = Field(
        False,
        status="prototype",
        description="Let clients send the two phases of a request themselves. A ticket names the hosts that a decode "
        "gang connects to and gives access to a prefill gang's KV: enable this only if every client is trusted.",
    )
    enable_request_chat_template: bool = Field(
        False,
        status="prototype",
        description="Let a request bring a chat template of its own, a program in Jinja's sandbox. Every body is then "
        "read in a process of its own, with a limit of processor time.",
    )
    api_keys: list[str] = Field(
        default_factory=list,
        status="prototype",
        description="API keys, one of which every route but /health, /ready and /ping then requires as 'Authorization: "
        "Bearer' or 'x-api-key'. A key may be given as 'sha256:' and its hex digest; only digests are kept.",
    )
    api_keys_file: str | None = Field(
        None,
        status="prototype",
        description="A file with more keys, one per line; read once, on the host of the driver.",
    )

    key_weights: dict[str, float] = Field(
        default_factory=dict,
        status="prototype",
        description="Shares of API keys, by the key or its digest: when requests wait, a key of weight 2 gets twice "
        "the tokens of one of weight 1, which is the default.",
    )
    admin_keys: list[str] = Field(
        default_factory=list,
        status="prototype",
        description="Keys for the admin port, given as API keys are. They open nothing else, and API keys do not open "
        "the admin port: a service with API keys and without admin keys lets nobody use it.",
    )
    admin_keys_file: str | None = Field(
        None,
        status="prototype",
        description="A file with more admin keys, one per line; read once, on the host of the driver.",
    )

    allow_unauthenticated_ray: bool = Field(
        False,
        status="prototype",
        description="Serve on a Ray cluster without token authentication. Everybody who can reach such a cluster's "
        "ports can run code on it, whatever the API keys: enable this only on a network that you trust.",
    )

    cors_origins: list[str] = Field(
        default_factory=list,
        status="prototype",
        description="Origins of web pages ('https://chat.example.org') whose scripts may call the service from a "
        "browser; '*' for any. Default: none.",
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _take_one_origin(cls, origins: object) -> object:
        return [origins] if isinstance(origins, str) else origins

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        if "*" in origins and len(origins) > 1:
            raise ValueError("'*' means any origin and must be the only one")
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin: scheme://host or scheme://host:port, without a path")
        return [origin.lower() for origin in origins]

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _keep_digests_only(cls, keys: list[str]) -> list[str]:
        return list(dict.fromkeys(map(digest_of, keys)))

    @field_validator("key_weights")
    @classmethod
    def _weigh_digests(cls, weights: dict[str, float]) -> dict[str, float]:
        if wrong := [weight for weight in weights.values() if not 0 < weight < math.inf]:
            raise ValueError(f"a weight is {wrong[0]:g}, must be more than 0")
        return {digest_of(key): weight for key, weight in weights.items()}

    @model_validator(mode="after")
    def _read_files(self) -> Self:
        if self.api_keys_file is not None:
            self.api_keys = _with_keys(self.api_keys, "api_keys_file", self.api_keys_file)
            self.api_keys_file = None
        if self.admin_keys_file is not None:
            self.admin_keys = _with_keys(self.admin_keys, "admin_keys_file", self.admin_keys_file)
            self.admin_keys_file = None
        if set(self.key_weights) - set(self.api_keys):
            raise ValueError("key_weights has a key that is not one of api_keys")
        if set(self.api_keys) & set(self.admin_keys):
            raise ValueError("a key is one of api_keys and of admin_keys: clients would be operators")
        return self


def _with_keys(digests: list[str], name: str, path: str) -> list[str]:
    return list(dict.fromkeys([*digests, *map(digest_of, read_keys(name, path))]))


class AdminConfig(StrictBaseModel):
    """The port for operators: a page with the live picture, the same as JSON, health with details, metrics."""

    host: str = Field(
        "127.0.0.1",
        status="prototype",
        min_length=1,
        description="Address that it listens on, on the head node. Any but loopback needs security.admin_keys.",
    )
    port: int | None = Field(None, status="prototype", ge=1, le=65535, description="Default: router.port + 200.")
    tls: ListenerTlsConfig | None = Field(None, status="prototype", description="HTTPS. Default: HTTP.")
    endpoint: str | None = Field(
        None,
        status="prototype",
        description="The service's own endpoint, for the chat of the page. Default: the first router replica.",
    )

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _ORIGIN.fullmatch(endpoint.rstrip("/")):
            raise ValueError(f"{endpoint!r} is not of the form http://host:port")
        return endpoint

    @property
    def scheme(self) -> str:
        return "http" if self.tls is None else "https"

    @property
    def reachable_host(self) -> str:
        """The address at which the head node reaches it."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def is_loopback(self) -> bool:
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
