"""The end of a service, seen from its driver: the service actor is killed when it is done, and continues alone when the
user does not wait for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from tensorweave.deploy import service
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.monitor import RayLost
from tensorweave.deploy.stop_signal import StopSignal


class FakeHandle:
    """An actor's handle, its class's options and its methods, all in one."""

    def __getattr__(self, name: str) -> FakeHandle:
        return self

    def remote(self, *arguments: object) -> FakeHandle:
        return self

    def options(self, **options: object) -> FakeHandle:
        return self


class FakeSentinel:
    name = "sentinel"

    def end(self) -> None:
        return None


class FakeRay:
    """`ray`, whose `get` ends as it is told."""

    def __init__(self, get: Callable[[], None]) -> None:
        self.num_killed = 0
        self._get = get

    def remote(self, cls: type[Any]) -> FakeHandle:
        return FakeHandle()

    def get(self, reference: FakeHandle, timeout: float) -> None:
        self._get()

    def kill(self, handle: FakeHandle) -> None:
        self.num_killed += 1


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    path = tmp_path / "service.yaml"
    path.write_text("model: some-model\n", encoding="utf-8")
    return load_config(path)


def is_done() -> None:
    return None


def is_late() -> None:
    raise GetTimeoutError("too late")


def is_interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("get", [is_done, is_late])
def test_the_service_actor_is_killed_at_the_end(
    get: Callable[[], None], config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(get)
    monkeypatch.setattr(service, "ray", ray)
    monkeypatch.setattr(service, "OwnSentinel", FakeSentinel)
    with ExitStack() as ending:
        service._start_service_actor(config, ending)
        assert ray.num_killed == 0
    assert ray.num_killed == 1


def test_a_second_interrupt_leaves_the_service_to_the_service_actor(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ray = FakeRay(is_interrupted)
    monkeypatch.setattr(service, "ray", ray)
    monkeypatch.setattr(service, "OwnSentinel", FakeSentinel)
    with pytest.raises(KeyboardInterrupt), ExitStack() as ending:
        service._start_service_actor(config, ending)
    assert ray.num_killed == 0, "nothing else would end the service on a cluster that stays"
    assert "not waiting any longer" in caplog.text


def test_nothing_is_asked_of_a_ray_that_is_lost(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked: list[str] = []

    def is_lost(*arguments: object) -> None:
        raise RayLost("its raylet has ended")

    monkeypatch.setattr(service, "ray", FakeRay(lambda: asked.append("the service actor")))
    monkeypatch.setattr(service, "OwnSentinel", FakeSentinel)
    monkeypatch.setattr(service, "RayCluster", lambda service_actor: None)
    monkeypatch.setattr(service, "monitor", is_lost)
    monkeypatch.setattr(service, "abandon_ray", lambda: True)
    with ExitStack() as ending:
        service_actor = service._start_service_actor(config, ending)
        assert service._keep_up(config, service_actor, StopSignal(), ending) == 1
    assert asked == []
    assert "giving up: its raylet has ended" in caplog.text
