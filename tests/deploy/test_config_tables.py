"""Limits, ports and keys that depend on each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.config_access import SecurityConfig
from tensorweave.deploy.config_file import ConfigError
from tensorweave.deploy.config_tables import LimitsConfig


@pytest.mark.parametrize(
    ("max_inflight", "max_queued", "expected"), [(512, 1024, 256), (4, 0, 4), (4, 8, 12), (1, 0, 1), (256, 0, 256)]
)
def test_a_request_has_no_more_sequences_than_there_is_room_for(
    max_inflight: int, max_queued: int, expected: int
) -> None:
    limits = LimitsConfig(max_inflight=max_inflight, max_queued=max_queued).router_limits()
    assert limits.max_sequences == expected


def test_the_admin_port_follows_the_routers_unless_it_is_given(tmp_path: Path) -> None:
    def config_of(*overrides: str) -> ServeConfig:
        path = tmp_path / "service.yaml"
        path.write_text("model: m", encoding="utf-8")
        return load_config(path, overrides)

    assert config_of().admin_port == 8200
    assert config_of("router.port=9000").admin_port == 9200
    assert config_of("admin.port=7000").admin_port == 7000
    assert config_of().endpoint == "http://127.0.0.1:8000"
    assert config_of("router.host=0.0.0.0", "router.port=9000").endpoint == "http://127.0.0.1:9000"
    keyed = config_of("admin.host=0.0.0.0", "security.admin_keys=[an-admin-key]")
    assert keyed.security.admin_keys[0].startswith("sha256:")
    for overrides, complaint in (
        (("admin.host=0.0.0.0",), "set security.admin_keys"),
        (("admin.port=8000",), "one of the router's ports"),
        (("admin.port=8100",), "one of the router's ports"),
        (("router.port=65400",), "would be 65600"),
        (("admin.endpoint=here",), "http://host:port"),
        (("security.api_keys=[one-same-key]", "security.admin_keys=[one-same-key]"), "clients would be operators"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            config_of(*overrides)


def test_admin_keys_come_from_a_file_too(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# operators\nan-admin-key\n", encoding="utf-8")
    security = SecurityConfig(admin_keys=["another-admin-key"], admin_keys_file=str(keys))
    assert len(security.admin_keys) == 2
    assert security.admin_keys_file is None
    with pytest.raises(ValueError, match="admin_keys_file"):
        SecurityConfig(admin_keys_file=str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("pools.decode.max_replicas=1", "pools.decode.replicas=2"), "not between min_replicas and max_replicas"),
        (("pools.decode.min_replicas=2",), "not between min_replicas and max_replicas"),
        (("engine.max_replicas=2",), "'max_replicas' belongs under a pool"),
        (("scaling.moves=true", "pools.decode.max_batch_size=7"), "differ in max_batch_size"),
        (("scaling.moves=true", "pools={main: {}}"), "needs a pool of role 'prefill' and one of role 'decode'"),
        (("scaling.slack=1.0",), "less than 1"),
    ],
)
def test_what_makes_no_sense_of_pools_that_change(tmp_path: Path, overrides: tuple[str, ...], complaint: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("model: m\npools: {prefill: {}, decode: {}}", encoding="utf-8")
    assert load_config(path, ["scaling.moves=true", "pools.decode.max_replicas=3"]).scaling.moves
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert complaint in str(refused.value)
