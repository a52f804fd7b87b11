"""What an update of a running service may change, and what it refuses by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.deployment import Deployment
from tensorweave.deploy.pinned_model import PinnedModel
from tests.e2e.service_process import write_model

_BASE: dict[str, Any] = {"served_model_name": "tiny", "pools": {"prefill": {}, "decode": {}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "first")


def _deployed(model: Path) -> Deployment:
    config = ServeConfig.model_validate({**_BASE, "model": str(model)})
    return Deployment.of(PinnedModel.find(config), 1, has_gpus=False)


def _changed(deployed: Deployment, **changes: Any) -> Deployment:
    config = ServeConfig.model_validate({**_BASE, "model": deployed.config.model, **changes})
    return deployed.changed(config.to_plain(), 2, has_gpus=False)


def test_the_same_file_changes_nothing(model: Path) -> None:
    deployed = _deployed(model)
    assert _changed(deployed).specs == deployed.specs


def test_engine_and_pools_may_change(model: Path) -> None:
    deployed = _deployed(model)
    new = _changed(deployed, engine={"max_batch_size": 4}, limits={"drain_timeout_s": 7}, scaling={"moves": True})
    assert [spec.gang.args["max_batch_size"] for spec in new.specs] == [4, 4]
    assert (new.generation, new.config.scaling.moves) == (2, True)
    [only] = _changed(deployed, pools={"main": {"replicas": 3}}).specs
    assert (only.name, only.replicas) == ("main", 3)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"served_model_name": "other"}, "served_model_name"),
        ({"router": {"port": 9000}}, "router"),
        ({"limits": {"max_inflight": 3}}, r"limits\.max_inflight"),
        ({"security": {"api_keys": ["k" * 32]}}, "security"),
        ({"engine": {"trust_remote_code": True}}, r"engine\.trust_remote_code"),
        ({"pools": {"prefill": {}, "decode": {}, "embed": {}}}, "pools of role 'embed'"),
    ],
)
def test_what_routers_have_read_is_refused_by_name(model: Path, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=f"{names} cannot change while it runs"):
        _changed(_deployed(model), **changes)


def test_another_model_needs_the_same_tokenizer(model: Path, tmp_path: Path) -> None:
    deployed = _deployed(model)
    newer = shutil.copytree(model, tmp_path / "newer")
    weights = newer / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    old, new = deployed.specs[0].gang, _changed(deployed, model=str(newer)).specs[0].gang
    assert old.model_digest != new.model_digest
    (newer / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json differs"):
        _changed(deployed, model=str(newer))
