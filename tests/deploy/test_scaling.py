"""When pools grow, shrink, and exchange gangs: decisions over measurements, on a clock that the tests set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.config_scaling import ScalingConfig
from tensorweave.deploy.pool_loads import PoolLoads
from tensorweave.deploy.scaling import Change, Move, PoolLoad, Scale, Trends, decide

_SETTINGS = ScalingConfig(hold_s=10, shrink_hold_s=60, pause_s=30, slack=0.7, moves=True)
_PREFILL = PoolLoad("prefill", "prefill", 2, 0.2, "TTFT p90 0.4 s of 2 s")
_DECODE = PoolLoad("decode", "decode", 2, 1.5, "ITL p90 150 ms of 100 ms")


def changes(settings: ScalingConfig, *loads: PoolLoad, until_s: float = 200.0) -> Iterator[tuple[float, Change]]:
    """What is decided every second while the loads stay as they are."""
    trends, now_s = Trends(), 0.0
    while now_s <= until_s:
        trends, change = decide(settings, loads, now_s, trends)
        if change is not None:
            yield now_s, change
        now_s += 1.0


def test_a_gang_moves_to_the_pool_that_is_above_its_targets_with_the_reason() -> None:
    at_s, change = next(changes(_SETTINGS, _PREFILL, _DECODE))
    assert at_s == 10.0
    assert change == Move(
        "prefill",
        "decode",
        "decode has pressure 1.50 (ITL p90 150 ms of 100 ms) for 10 s; prefill has pressure 0.20 (TTFT p90 0.4 s of "
        "2 s), and would have 0.40 with 1 gangs",
    )
    assert [at_s for at_s, _ in changes(_SETTINGS, _PREFILL, _DECODE)][:3] == [10.0, 40.0, 70.0], "pauses, then again"


@pytest.mark.parametrize(
    ("prefill", "settings"),
    [
        (replace(_PREFILL, num_gangs=1), _SETTINGS),
        (replace(_PREFILL, pressure=0.36), _SETTINGS),  # 0.72 with one gang: it would come back
        (replace(_PREFILL, min_gangs=2), _SETTINGS),
        (replace(_PREFILL, is_settled=False), _SETTINGS),
        (replace(_PREFILL, role="both"), _SETTINGS),
        (_PREFILL, _SETTINGS.model_copy(update={"moves": False})),
    ],
)
def test_nothing_moves_that_is_needed_or_asked_to_stay(prefill: PoolLoad, settings: ScalingConfig) -> None:
    assert list(changes(settings, prefill, _DECODE)) == []


def test_a_pool_grows_by_its_pressure_up_to_its_bound() -> None:
    busy = replace(_DECODE, num_gangs=4, max_gangs=20)
    [(at_s, change), *_] = changes(_SETTINGS, busy)
    assert (at_s, change) == (10.0, Scale("decode", 6, "decode has pressure 1.50 (ITL p90 150 ms of 100 ms) for 10 s"))
    for more, replicas in (({"pressure": 9.0}, 8), ({"pressure": 1.0}, 5), ({"max_gangs": 5}, 5)):
        [(_, change), *_] = changes(_SETTINGS, replace(busy, **more))  # type: ignore[arg-type]
        assert isinstance(change, Scale)
        assert change.replicas == replicas
    assert list(changes(_SETTINGS, replace(busy, max_gangs=4))) == []
    assert list(changes(_SETTINGS, replace(busy, max_gangs=None))) == []


def test_a_pool_shrinks_if_one_less_has_done_for_long() -> None:
    idle = replace(_DECODE, pressure=0.3, min_gangs=1)
    [(at_s, change), *_] = changes(_SETTINGS, idle)
    assert at_s == 60.0
    assert isinstance(change, Scale)
    assert change.replicas == 1
    assert list(changes(_SETTINGS, replace(idle, min_gangs=2))) == []
    assert list(changes(_SETTINGS, replace(idle, pressure=0.36))) == []
    assert list(changes(_SETTINGS, replace(idle, min_gangs=None))) == []


def test_a_pressure_must_last() -> None:
    trends = Trends()
    for now_s in range(100):
        load = replace(_DECODE, max_gangs=9, pressure=1.5 if now_s % 9 else 0.9)
        trends, change = decide(_SETTINGS, [load], float(now_s), trends)
        assert change is None


def test_loads_are_what_gangs_and_routers_report() -> None:
    config = ServeConfig.model_validate({"model": "m", "pools": {"prefill": {"max_replicas": 3}, "decode": {}}})
    pools = [_pool("prefill", num_requests_waiting=10.0), _pool("decode", kv_blocks=100.0, kv_blocks_used=95.0)]
    prefill, decode = PoolLoads().measure(config, pools, {}, 0.0)
    assert (prefill.pressure, prefill.reason) == (2.5, "10.0 sequences wait per gang, of 4")
    assert (decode.pressure, decode.reason) == (1.0, "95% of the KV blocks in use")
    assert (prefill.min_gangs, prefill.max_gangs, prefill.num_gangs, prefill.is_settled) == (None, 3, 1, True)
    pools[0]["replicas"] = 2
    assert not PoolLoads().measure(config, pools, {}, 0.0)[0].is_settled


def _pool(name: str, **gauges: float) -> dict[str, Any]:
    gangs = [{"state": "ready", "ranks": [{"gauges": gauges}]}]
    return {"pool": name, "role": name, "replicas": 1, "gangs": gangs}
