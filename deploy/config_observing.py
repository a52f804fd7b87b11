"""The tables of a service's configuration that say what it tells of itself: its log and its traces."""

from __future__ import annotations

import importlib.util
import re
from typing import Final

from pydantic import field_validator

from tensorweave.cluster.log_setup import LogFormat, LogLevel, LogSettings
from tensorweave.cluster.strict_model import Field, StrictBaseModel

_URL: Final = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http"


class LoggingConfig(StrictBaseModel):
    """What the driver, the router replicas, the supervisor and the ranks write to standard error, all in one form."""

    format: LogFormat = Field(
        "text", status="prototype", description="'json': each line is an object with time, level, process and message."
    )
    level: LogLevel = Field(
        "WARNING",
        status="prototype",
        description="Lines of this level and above are written; the driver's lines about its progress always are.",
    )
    requests: bool = Field(
        False,
        status="prototype",
        description="One line per request, with its id, status, numbers of tokens, times and gangs; never a prompt nor "
        "an output.",
    )

    def settings(self) -> LogSettings:
        return LogSettings(self.format, self.level)


class TracingConfig(StrictBaseModel):
    """OpenTelemetry traces, one per request, from the HTTP request through prefill, KV handover and decode."""

    endpoint: str | None = Field(
        None,
        status="prototype",
        description="A collector's URL for traces over OTLP/HTTP, for example http://127.0.0.1:4318/v1/traces. Needs "
        "pip install 'tensorweave[tracing]'. Default: no traces.",
    )
    share: float = Field(
        1.0,
        status="prototype",
        ge=0,
        le=1,
        description="Share of the requests that are traced. Requests whose client sends a `traceparent` follow it.",
    )
    service_name: str = Field("tensorweave", status="prototype", min_length=1, description="The service's name there.")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        if not _URL.fullmatch(endpoint):
            raise ValueError("is not of the form http://host:port/v1/traces")
        if not _has_exporter():
            raise ValueError("needs OpenTelemetry's exporter: pip install 'tensorweave[tracing]'")
        return endpoint


def _has_exporter() -> bool:
    try:
        return importlib.util.find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
