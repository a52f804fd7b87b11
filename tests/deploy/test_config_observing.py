"""What a configuration says of logs and traces, and what a router replica makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorweave.cluster.log_setup import LogSettings
from tensorweave.deploy import config_observing
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.config_file import ConfigError
from tensorweave.deploy.pools import pool_specs
from tensorweave.deploy.serve_app import _recorders
from tensorweave.router.http.request_log import RequestLog
from tensorweave.router.http.tracing import Tracing

COLLECTOR = "http://127.0.0.1:9/v1/traces"


def config_of(tmp_path: Path, *overrides: str) -> ServeConfig:
    path = tmp_path / "service.yaml"
    path.write_text("model: m", encoding="utf-8")
    return load_config(path, overrides)


def test_the_ranks_log_as_the_others_do(tmp_path: Path) -> None:
    config = config_of(tmp_path, "logging.format=json", "logging.level=INFO")
    assert config.logging.settings() == LogSettings("json", "INFO")
    [spec] = pool_specs(config, has_gpus=False)
    assert spec.gang.worker_options == {"log": LogSettings("json", "INFO")}
    assert ServeConfig.from_plain(config.to_plain()).logging == config.logging


def test_a_router_records_what_is_asked_for(tmp_path: Path) -> None:
    assert _recorders(config_of(tmp_path), "r") == []
    both = _recorders(config_of(tmp_path, "logging.requests=true", f"tracing.endpoint={COLLECTOR}"), "r")
    assert [type(recorder) for recorder in both] == [RequestLog, Tracing]
    for recorder in both:
        recorder.close()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("logging.level=LOUD", "logging.level = 'LOUD'"),
        ("logging.format=xml", "logging.format = 'xml'"),
        ("tracing.endpoint=collector:4318", "is not of the form http://host:port/v1/traces"),
        ("tracing.share=1.5", "tracing.share = 1.5"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(tmp_path, override)
    assert complaint in str(refusal.value)


def test_traces_need_the_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("opentelemetry.exporter.gone", "gone.exporter"):
        monkeypatch.setattr(config_observing, "_EXPORTER", missing)
        with pytest.raises(ConfigError, match=r"pip install 'tensorweave\[tracing\]'"):
            config_of(tmp_path, f"tracing.endpoint={COLLECTOR}")
