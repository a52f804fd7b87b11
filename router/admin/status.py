"""`Status`: what `GET /status` answers, which the page and `tensorweave top` show. Its JSON schema is in
`/openapi.json` of the admin port; fields are only ever added to it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Percentiles(BaseModel):
    """Percentiles of one latency, in seconds, estimated from a histogram's buckets. None: nothing was observed in the
    window."""

    p50_s: float | None = None
    p90_s: float | None = None
    p99_s: float | None = None


class Traffic(BaseModel):
    """All routers together. Rates and latencies are those of the window; None: not known yet."""

    num_running: int = Field(description="Sequences that routers have admitted and that have not ended.")
    num_waiting: int = Field(description="Sequences that wait at routers for admission.")
    waiting_tokens: int = Field(0, description="Tokens of these, prompts and expected answers.")
    expected_wait_s: float = Field(0.0, description="The longest time that all that waits at a router is to wait.")
    requests_per_s: float | None = Field(description="HTTP requests answered.")
    refused_per_s: float | None = Field(None, description="Sequences refused by admission.")
    prompt_tokens_per_s: float | None = Field(description="Prompt tokens of requests that arrived.")
    cached_share: float | None = Field(description="The share of these tokens that was found in a prefix cache.")
    output_tokens_per_s: float | None
    time_to_first_token: Percentiles
    inter_token_latency: Percentiles
    request_latency: Percentiles


class Router(BaseModel):
    name: str
    report_age_s: float = Field(description="Since its last report. A router that is silent for 30 s is left out.")
    num_running: int
    num_waiting: int


class Blocks(BaseModel):
    """KV blocks of a gang; those that are neither used nor cached are empty."""

    num_total: int
    num_used: int = Field(description="Held by requests.")
    num_cached: int = Field(description="Held by no request, and kept for prompts with the same prefix.")


class Rank(BaseModel):
    rank: int
    host: str
    pid: int
    progress_age_s: float | None = Field(description="Since the step loop's last progress; None before it runs.")
    num_requests: int
    num_open_files: int
    stage: int = Field(0, description="Its pipeline stage.")


class RankLink(BaseModel):
    """The link between the ranks of a gang."""

    megabytes_per_s: float | None = None
    latency_ms: float | None = None
    slow: str | None = Field(None, description="Why it is considered slow.")


class Gang(BaseModel):
    gang_id: str
    state: Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]
    epoch: int = Field(description="How many gangs this slot of the pool has had.")
    reason: str | None = Field(description="Why it is not ready, or was not.")
    starting: str | None = Field(description="The phases of its ranks, if its start takes long.")
    num_running: int = Field(description="Sequences that hold KV blocks.")
    num_waiting: int = Field(description="Sequences that wait for KV blocks or a place in the batch.")
    prompt_tokens_per_s: float | None = Field(description="Prompt tokens computed.")
    output_tokens_per_s: float | None
    blocks: Blocks | None
    ranks: list[Rank]
    rank_link: RankLink | None
    stage_busy_shares: list[float | None] = Field(
        [],
        description="Of each pipeline stage, the share of the window in which it computed; empty where gangs have one.",
    )


class PoolEvent(BaseModel):
    time_s: float = Field(description="Seconds since 1970.")
    pool: str
    gang_id: str
    kind: Literal["ready", "fault", "not placed", "scaled", "moved", "update"]
    text: str


class PoolUpdate(BaseModel):
    """The latest change of a pool's gangs to another configuration."""

    state: Literal["running", "done", "stopped"]
    text: str


class Pool(BaseModel):
    name: str
    role: str
    num_wanted: int
    num_ready: int
    failure: str | None = Field(description="Why none of its gangs will be ready soon.")
    trouble: str | None = Field(description="Its last problem.")
    notice: str | None = Field(description="Something else that operators should know.")
    is_updating: bool = Field(False, description="Whether an update of the service is under way.")
    update: PoolUpdate | None = None
    pressure: float | None = Field(
        None, description="The largest of what is measured, divided by its target; see `scaling`. None: not measured."
    )
    pressure_reason: str | None = Field(None, description="What was measured.")
    gangs: list[Gang]


class KvLink(BaseModel):
    """What the self-test measured on the link from a prefill to a decode gang."""

    source: str
    target: str
    megabytes_per_s: float
    latency_ms: float
    error: str | None
    address: str = Field("", description="Where the source's KV is read, on its first rank's host.")


class Transfers(BaseModel):
    """KV between gangs, over all ranks of the gangs that are present."""

    bytes_per_s: float | None
    num_bytes: int
    num_blocks: int
    num_failures: int = Field(description="Blocks that did not arrive or were wrong; they were sent again or computed.")
    num_open: int = Field(description="Fetches that are running.")
    links: list[KvLink]


class Faults(BaseModel):
    num_gang_faults: int = Field(description="Gangs that ended or did not start, since the pools began.")
    num_retries: int = Field(description="Attempts of requests that were lost and replayed.")
    num_recovered: int = Field(description="Sequences that ended well after a replay.")
    num_rejected: int = Field(description="Requests that were answered with an error.")
    events: list[PoolEvent] = Field(description="The latest, newest first.")


class Point(BaseModel):
    """The service at one moment; rates and latencies since the point before."""

    time_s: float
    num_running: int
    num_waiting: int
    output_tokens_per_s: float | None
    ttft_p50_s: float | None
    itl_p50_s: float | None


class Status(BaseModel):
    time_s: float = Field(description="When this was true, in seconds since 1970.")
    model: str
    version: str
    health: Literal["ok", "unavailable"]
    reason: str = Field(description="Why it is unavailable, or what it lacks while it is not.")
    window_s: float | None = Field(description="The time that rates and latencies cover.")
    traffic: Traffic
    routers: list[Router]
    pools: list[Pool]
    transfers: Transfers
    faults: Faults
    history: list[Point] = Field(description="Up to five minutes, oldest first, of the time in which somebody looked.")
