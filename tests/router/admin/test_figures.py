"""Rates of counters and percentiles of histograms, over routers that come, go and start again."""

from __future__ import annotations

import math

import pytest

from tensorweave.cluster.router_report import MetricRows, RouterReport
from tensorweave.router.admin.figures import Buckets, RouterFigures, observed, percentile, rate, total


def figures(clock_s: float, total: float = 0.0, **buckets: Buckets) -> RouterFigures:
    return RouterFigures(clock_s, {"tokens_total": total}, buckets)


def test_a_report_in_short() -> None:
    labels = (("model_name", "m"),)
    rows = (
        ("tensorweave_a_total", (*labels, ("reason", "x")), 2.0),
        ("tensorweave_a_total", (*labels, ("reason", "y")), 3.0),
        ("tensorweave_a_created", labels, 1e9),
    )
    histogram = (
        ("tensorweave_h_bucket", (*labels, ("le", "0.5")), 1.0),
        ("tensorweave_h_bucket", (*labels, ("le", "+Inf")), 4.0),
        ("tensorweave_h_count", labels, 4.0),
    )
    families = (
        MetricRows("tensorweave_a", "counter", "", rows),
        MetricRows("tensorweave_h", "histogram", "", histogram),
    )
    short = RouterFigures.of(RouterReport("r", 7.0, families))
    assert short == RouterFigures(7.0, {"a_total": 5.0, "h_count": 4.0}, {"h": {0.5: 1.0, math.inf: 4.0}})


def test_a_rate_is_that_of_the_routers_own_clocks() -> None:
    before = {"a": figures(10.0, 100.0), "b": figures(500.0, 0.0), "gone": figures(1.0, 1e6)}
    now = {"a": figures(12.0, 140.0), "b": figures(501.0, 5.0), "new": figures(3.0, 1e6)}
    assert rate(before, now, "tokens_total") == 25.0
    assert total(now, "tokens_total") == 145.0 + 1e6
    assert rate({}, now, "tokens_total") is None
    assert rate(now, now, "tokens_total") is None, "no router has reported since"
    assert rate(before, {"a": figures(11.0, 3.0)}, "tokens_total") == 0.0, "a counter that has begun anew"


def test_what_was_observed_in_between() -> None:
    before = {"a": figures(1.0, h={0.1: 5.0, math.inf: 5.0}), "b": figures(1.0)}
    now = {
        "a": figures(2.0, h={0.1: 6.0, math.inf: 9.0}),
        "b": figures(2.0, h={0.1: 2.0, math.inf: 2.0}),
        "new": figures(2.0, h={0.1: 50.0, math.inf: 50.0}),
    }
    assert observed(before, now, "h") == {0.1: 3.0, math.inf: 6.0}


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.0), (0.25, 0.05), (0.5, 0.1), (0.75, 0.25), (0.8, 0.28), (0.95, 0.4), (1.0, 0.4)]
)
def test_percentiles_are_prometheus(share: float, expected: float) -> None:
    """Ten observations: five up to 0.1, eight (at 0.28 linearly) below 0.3, nine up to 0.4, one beyond."""
    buckets = {0.1: 5.0, 0.3: 8.333333333333334, 0.4: 9.0, math.inf: 10.0}
    assert percentile(buckets, share) == pytest.approx(expected)


def test_nothing_observed_has_no_percentile() -> None:
    assert percentile({}, 0.5) is None
    assert percentile({0.1: 0.0, math.inf: 0.0}, 0.5) is None
