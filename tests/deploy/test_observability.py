"""What deploy/observability/ has for Prometheus and Grafana: it names metrics that exist, and promtool accepts it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tensorweave.deploy import admin_port
from tensorweave.router.http.metrics import _OF_GANGS
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tests.router.admin.small_admin import SmallAdmin, gang, pool, rank, router_metrics

FOLDER = Path(admin_port.__file__).parent / "observability"
PROMTOOL = shutil.which("promtool")
NAME = re.compile(r"\btensorweave_[a-z0-9_]+\b")
GRAFANAS_OWN = {"$__rate_interval": "5m", "$model": ".*"}

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")


def exposition() -> str:
    """The admin port's metrics of a service whose gang reports everything that gangs report."""
    gauges = {**dict.fromkeys(_OF_GANGS, 0.0), **TransferStats().gauges()}
    link = {"megabytes_per_s": 900.0, "latency_ms": 0.2, "error": None}
    admin, metrics = SmallAdmin(pool("main", gang("g", rank(0, **gauges), kv_links={"p": link}))), router_metrics()
    metrics.observe_first_token(0.1, 1)
    admin.routers.note(metrics.report("r"))
    return admin.get("/metrics").text


@pytest.fixture(scope="module")
def known() -> set[str]:
    families = list(text_string_to_metric_families(exposition()))
    labelled = {
        "tensorweave_request_retries_total",
        "tensorweave_requests_rejected_total",
        "tensorweave_http_requests_total",
    }
    return {sample.name for family in families for sample in family.samples} | labelled


def dashboard() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((FOLDER / "grafana_dashboard.json").read_text(encoding="utf-8"))
    return whole


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def unknown(expression: str, known: set[str]) -> set[str]:
    names = {name for name in NAME.findall(expression) if not name.endswith("_failures_")}
    return names - known


def test_alerts_and_panels_name_metrics_that_exist(known: set[str]) -> None:
    for expression in [*expressions(), *(rule["expr"] for rule in alerts())]:
        assert unknown(expression, known) == set(), expression
    assert unknown("rate(tensorweave_gone_total[5m])", known) == {"tensorweave_gone_total"}


def test_the_panels_lie_beside_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_the_target_is_the_admin_ports_default() -> None:
    [job] = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8200"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"


def promtool(*arguments: str, given: str | None = None) -> str:
    assert PROMTOOL is not None
    command = [PROMTOOL, *arguments]
    run = subprocess.run(command, cwd=FOLDER, input=given, text=True, capture_output=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@needs_promtool
def test_promtool_takes_the_configuration_and_every_alert_is_tried() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "alerts_test.yml")
    tried = yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"][0]["alert_rule_test"]
    assert {test["alertname"] for test in tried} == {rule["alert"] for rule in alerts()}


@needs_promtool
def test_promtool_takes_the_panels_expressions(tmp_path: Path) -> None:
    rules = []
    for number, expression in enumerate(expressions()):
        for name, value in GRAFANAS_OWN.items():
            expression = expression.replace(name, value)
        rules.append({"record": f"panel:{number}", "expr": expression})
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", str(file))


@needs_promtool
def test_promtool_takes_the_metrics() -> None:
    assert PROMTOOL is not None
    run = subprocess.run([PROMTOOL, "check", "metrics"], input=exposition(), text=True, capture_output=True, timeout=60)
    complaints = [
        line for line in (run.stdout + run.stderr).splitlines() if not line.startswith("tensorweave_kv_cache_usage")
    ]
    assert complaints == []
