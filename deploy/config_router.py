"""The table of a service's configuration for its HTTP front end."""

from __future__ import annotations

from typing import Final, Self

from pydantic import model_validator

from tensorweave.cluster.strict_model import Field, StrictBaseModel
from tensorweave.deploy.config_tls import ListenerTlsConfig
from tensorweave.router.dispatch.policy import PolicyName

_EVERYWHERE: Final = ("0.0.0.0", "::")


class RouterConfig(StrictBaseModel):
    """The HTTP front end: Serve replicas that clients connect to directly, and Serve's proxy as an alternative."""

    host: str = Field(
        "127.0.0.1", status="prototype", description="Address that replicas and proxy listen on; 0.0.0.0 for all."
    )
    port: int = Field(
        8000, status="prototype", ge=1, le=65535, description="Port of the first router replica; the others follow it."
    )
    proxy_port: int = Field(
        8100,
        status="prototype",
        ge=1,
        le=65535,
        description="Port of Serve's proxy, which distributes requests over the replicas.",
    )
    replicas: int = Field(
        1, status="prototype", ge=1, le=64, description="Router replicas, each with a port of its own."
    )
    per_host: bool = Field(
        False,
        status="prototype",
        description="One replica on each host that the cluster has at the start, all at `port`, in place of `replicas` "
        "on the head: clients may use any of them. Needs host 0.0.0.0 or '::', for each host has another address.",
    )
    tls: ListenerTlsConfig | None = Field(None, status="prototype", description="HTTPS. Default: HTTP.")
    policy: PolicyName = Field(
        "joint",
        status="prototype",
        description=(
            "Which gangs a request is sent to. 'joint' weighs queues, cached prompts, the link between gangs and what "
            "it has learnt of their speeds; the others only rotate or compare numbers of requests."
        ),
    )
    min_prefill_tokens: int = Field(
        64,
        status="prototype",
        ge=0,
        description="A prompt with fewer tokens to compute is not sent to the prefill pool.",
    )
    max_events_per_s: float = Field(
        8000.0,
        status="prototype",
        gt=0,
        description="Most events of a replica's streams in a second. With more tokens than that, the events hold the "
        "tokens of several steps: beyond about 10,000 a second neither a router nor a client's process keeps up.",
    )
    ttft_limit_ms: float | None = Field(
        None,
        status="prototype",
        gt=0,
        description="Limit of the time to a first token that the joint policy tries to keep. Default: the less the "
        "better.",
    )
    itl_limit_ms: float | None = Field(
        None,
        status="prototype",
        gt=0,
        description="Limit of the time between two tokens that the joint policy tries to keep. Default: the less the "
        "better.",
    )

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        last = self.port + self.replicas - 1
        if last > 65535:
            raise ValueError(f"{self.replicas} replicas from port {self.port} would pass 65535")
        if self.port <= self.proxy_port <= last:
            raise ValueError(f"proxy_port {self.proxy_port} is one of the replicas' own ports ({self.port} to {last})")
        return self

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        if self.per_host and self.host not in _EVERYWHERE:
            raise ValueError(f"per_host needs host 0.0.0.0 or '::': no two hosts have the address {self.host}")
        if self.per_host and self.replicas > 1:
            raise ValueError("per_host has one replica on each host: leave replicas out")
        return self

    @property
    def scheme(self) -> str:
        return "http" if self.tls is None else "https"

    @property
    def reachable_host(self) -> str:
        """The address at which this machine reaches replicas and proxy."""
        return "127.0.0.1" if self.host in _EVERYWHERE else self.host
