"""The tables of a service's configuration: a pool, limits, Ray. `deploy.config` combines them with the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from tensorweave.cluster.llm_args import LlmArgs
from tensorweave.cluster.protocol import Role
from tensorweave.cluster.speculation_config import UserProvidedDecodingConfig
from tensorweave.cluster.strict_model import Field, StrictBaseModel
from tensorweave.cluster.tls import TlsFiles
from tensorweave.deploy.config_placement import PlacementConfig
from tensorweave.deploy.config_tls import PeerTlsConfig
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.guided.limits import GuidedLimits


class PoolConfig(LlmArgs):
    """A pool of identical gangs. Every engine argument can be set here and overrides the one under `engine`."""

    model: str | Path = Field("", description="Set by `ServeConfig`.")
    role: Role = Field(
        "both",
        status="prototype",
        description="What its gangs do. Default: the pool's name if that is 'prefill', 'decode' or 'embed'; else "
        "'both'.",
    )
    replicas: int = Field(1, status="prototype", ge=1, description="Gangs in the pool.")
    min_replicas: int | None = Field(
        None, status="prototype", ge=1, description="Fewest gangs, if the pool shrinks by itself; see 'scaling'."
    )
    max_replicas: int | None = Field(
        None, status="prototype", ge=1, description="Most gangs, if the pool grows by itself; see 'scaling'."
    )
    placement: PlacementConfig = Field(
        default_factory=PlacementConfig, status="prototype", description="The hosts that its gangs are on."
    )
    gpus_per_rank: float = Field(
        1.0,
        status="prototype",
        gt=0,
        le=1,
        description="Share of a GPU that Ray reserves for a rank, where ranks run on GPUs. Below 1, gangs of one rank "
        "share a GPU: set kv_cache_config.max_tokens, because each rank would else take what the ranks before it left.",
    )
    max_faults: int = Field(
        5,
        status="prototype",
        ge=1,
        description="After so many faults within fault_window_s, a gang is started again only after pauses of 30 s to "
        "10 minutes, until one has served for fault_window_s.",
    )
    generation_config: Literal["auto", "none", "trtllm"] = Field(
        "auto",
        status="prototype",
        description="'auto', here the default: sampling fields that a request leaves out are those of the model's "
        "generation_config.json. 'none' or 'trtllm': they are not.",
    )
    fault_window_s: float = Field(
        300.0, status="prototype", gt=0, description="The time within which a gang's faults are counted."
    )

    @field_validator("tool_parser", "reasoning_parser")
    @classmethod
    def _check_parser(cls, name: str | None, info: ValidationInfo) -> str | None:
        choose_format(None, **{str(info.field_name): name})
        return name

    @field_validator("skip_tokenizer_init")
    @classmethod
    def _check_tokenizer(cls, skip: bool) -> bool:
        if skip:
            raise ValueError("the HTTP service needs the tokenizer")
        return skip

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not (self.min_replicas or 1) <= self.replicas <= (self.max_replicas or self.replicas):
            raise ValueError(
                f"replicas is {self.replicas}, which is not between min_replicas and max_replicas "
                f"({self.min_replicas}, {self.max_replicas})"
            )
        return self

    @model_validator(mode="after")
    def _check_shared_gpu(self) -> Self:
        if self.gpus_per_rank < 1 and self.tensor_parallel_size > 1:
            raise ValueError(
                f"gpus_per_rank is {self.gpus_per_rank:g} and tensor_parallel_size {self.tensor_parallel_size}: the "
                "ranks of a gang need a whole GPU each (NCCL connects no two ranks of one GPU)"
            )
        return self

    @model_validator(mode="after")
    def _refuse_llm_class_arguments(self) -> Self:
        events = self.kv_cache_config.event_buffer_max_size
        drafts = self.speculative_config
        of_user = drafts if isinstance(drafts, UserProvidedDecodingConfig) else None
        given = {
            "speculative_config.drafter as an object": of_user is not None and not isinstance(of_user.drafter, str),
            "speculative_config.resource_manager": of_user is not None and of_user.resource_manager is not None,
            "batched_logits_processor": self.batched_logits_processor is not None,
            "return_perf_metrics": self.return_perf_metrics,
            "enable_tqdm": self.enable_tqdm,
            "kv_cache_config.event_buffer_max_size": events > 0,
        }
        if names := [name for name, is_given in given.items() if is_given]:
            are = "is" if len(names) == 1 else "are"
            raise ValueError(f"{', '.join(names)} {are} for the LLM class; a service has no output for it")
        return self

    def llm_args(self) -> LlmArgs:
        """What each rank of the pool receives."""
        return LlmArgs(**{key: value for key, value in self.model_dump().items() if key in LlmArgs.model_fields})


class LimitsConfig(StrictBaseModel):
    """Limits and timeouts; requests are counted per router replica."""

    max_inflight: int = Field(
        512, status="prototype", ge=1, description="Most requests that run at the gangs at a time."
    )
    max_queued: int = Field(
        1024, status="prototype", ge=0, description="Most requests that wait beyond those; one more is answered 429."
    )
    max_inflight_tokens: int | None = Field(
        None,
        status="prototype",
        ge=1,
        description="Most tokens of requests that run at the gangs, prompts and expected answers. Default: no limit.",
    )
    max_queued_tokens: int = Field(
        4 * 2**20,
        status="prototype",
        ge=1,
        description="Most prompt tokens of requests that wait beyond those, which bounds the router's memory (36 bytes "
        "each); one more request is answered 429.",
    )
    max_ttft_s: float | None = Field(
        None,
        status="prototype",
        gt=0,
        description="Bound of the time to the first token when there is more work than the gangs can do: half of it is "
        "the longest wait (who is expected to wait longer is answered 429 at once), and no more requests run at the "
        "gangs than have their first tokens in the rest. Default: no limit.",
    )
    queue_timeout_s: float = Field(
        60.0, status="prototype", gt=0, description="Longest wait for a place to run; then the answer is 429."
    )
    request_timeout_s: float = Field(
        600.0, status="prototype", gt=0, description="Deadline of a request that names none."
    )
    max_request_timeout_s: float = Field(
        3600.0, status="prototype", gt=0, description="Longest deadline that a request may ask for."
    )
    max_body_bytes: int = Field(
        8 * 2**20, status="prototype", ge=1, description="Largest request body; above it the answer is 413."
    )
    max_held_body_bytes: int = Field(
        256 * 2**20,
        status="prototype",
        ge=1,
        description="Most bytes of request bodies that a router replica holds at a time; beyond it the answer is 429.",
    )
    body_timeout_s: float = Field(
        60.0, status="prototype", gt=0, description="Longest time for a request's whole body; then the answer is 408."
    )
    max_sequences: int = Field(
        256, status="prototype", ge=1, description="Most sequences of one request, prompts times n."
    )
    max_guide_bytes: int = Field(
        64 << 10,
        status="prototype",
        ge=1,
        le=256 << 10,
        description="Largest JSON schema, regular expression or grammar that an answer must follow, as text.",
    )
    max_guide_depth: int = Field(
        64, status="prototype", ge=1, le=120, description="Most levels of nesting of such a schema's JSON."
    )
    max_guide_alternatives: int = Field(
        16_384, status="prototype", ge=1, description="Most alternatives of such a schema, its unions written out."
    )
    max_pattern_size: int = Field(
        10_000,
        status="prototype",
        ge=1,
        description="Most characters of a regular expression with its bounded repetitions written out.",
    )
    max_json_whitespace: int = Field(
        8,
        status="prototype",
        ge=0,
        le=1024,
        description="Most white-space characters between two elements of a JSON answer that follows a schema; 0: the "
        "compact form.",
    )
    start_timeout_s: float = Field(
        900.0, status="prototype", gt=0, description="A service that is not ready by then ends with exit code 1."
    )
    place_timeout_s: float | None = Field(
        None,
        status="prototype",
        gt=0,
        description="How long a gang waits for resources on the Ray cluster before placing it counts as failed. "
        "Default: 20 s, and pools that the cluster could not hold even when idle are refused at once; 600 s if the "
        "cluster has an autoscaler. Set it if nodes join later: the gangs that fit serve, and the others follow.",
    )
    outage_timeout_s: float = Field(
        300.0,
        status="prototype",
        gt=0,
        description="A service whose gangs have all kept failing for so long ends with exit code 1.",
    )
    recovery_timeout_s: float = Field(
        300.0, status="prototype", gt=0, description="How long a request whose gang was lost waits for another one."
    )
    max_attempts: int = Field(
        8, status="prototype", ge=1, description="Gangs that one request may lose before it fails."
    )
    max_lost_in_a_row: int = Field(
        4,
        status="prototype",
        ge=1,
        description="Gangs that one request may lose in a row without a new token: the request may be the cause.",
    )
    reattach_grace_s: float = Field(
        10.0,
        status="prototype",
        ge=0,
        le=60,
        description="How long a request with a client-given id runs on after its router was lost, for another router.",
    )
    drain_timeout_s: float = Field(
        30.0, status="prototype", ge=0, description="How long running requests may take to finish at shutdown."
    )

    @model_validator(mode="after")
    def _check_bodies(self) -> Self:
        if self.max_held_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_body_bytes is {self.max_held_body_bytes}, less than max_body_bytes ({self.max_body_bytes})"
            )
        return self

    def guided_limits(self) -> GuidedLimits:
        return GuidedLimits(
            max_bytes=self.max_guide_bytes,
            max_depth=self.max_guide_depth,
            max_shapes=self.max_guide_alternatives,
            max_pattern_size=self.max_pattern_size,
            max_whitespace=self.max_json_whitespace,
        )

    def router_limits(self, key_weights: Mapping[str, float] | None = None) -> Limits:
        """Limits of one replica; `key_weights` by the names of API keys. A request may not have more sequences than can
        be admitted together: it would get 429 for ever."""
        return Limits(
            max_inflight=self.max_inflight,
            max_inflight_tokens=self.max_inflight_tokens,
            max_queued=self.max_queued,
            max_queued_tokens=self.max_queued_tokens,
            max_ttft_s=self.max_ttft_s,
            key_weights=key_weights or {},
            queue_timeout_s=self.queue_timeout_s,
            default_deadline_s=self.request_timeout_s,
            max_deadline_s=self.max_request_timeout_s,
            recovery_timeout_s=self.recovery_timeout_s,
            max_attempts=self.max_attempts,
            max_lost_in_a_row=self.max_lost_in_a_row,
            reattach_grace_s=self.reattach_grace_s,
            max_body_bytes=self.max_body_bytes,
            max_held_body_bytes=self.max_held_body_bytes,
            body_timeout_s=self.body_timeout_s,
            max_sequences=min(self.max_sequences, self.max_inflight + self.max_queued),
        )


class RayConfig(StrictBaseModel):
    """Which Ray cluster the service runs on."""

    address: str | None = Field(
        None,
        status="prototype",
        description="A running cluster ('auto', 'host:port'). Default: RAY_ADDRESS if set, else one of its own.",
    )


class NetworkConfig(StrictBaseModel):
    """Which of the hosts' networks is used for what. Default: the address by which Ray knows a host, for all of it."""

    transfer: str | None = Field(
        None,
        status="prototype",
        min_length=1,
        description="KV between gangs: the name of an interface ('ib0'), or a network ('10.80.0.0/16') in which each "
        "host has an address.",
    )
    tls: PeerTlsConfig | None = Field(
        None,
        status="prototype",
        description="Encrypt what routers and gangs, and gangs among themselves, send each other. Default: no.",
    )
    allow_plain_gangs: bool = Field(
        False,
        status="prototype",
        description="Let a gang span hosts although tls is set. Gloo and NCCL, which connect its ranks, do not "
        "encrypt.",
    )

    def tls_files(self) -> TlsFiles | None:
        return None if self.tls is None else self.tls.files()
