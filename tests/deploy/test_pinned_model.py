"""A model by name is looked up on every host, in one revision; a host with other files is reported."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.gang_start import GangStart
from tensorweave.cluster.mesh import Mesh
from tensorweave.cluster.rank_places import RankPlaces
from tensorweave.cluster.ranks import RankOrder, RankPlace
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.pinned_model import PinnedModel
from tensorweave.deploy.pools import pool_specs
from tensorweave.workers.engine_dir.model_digest import check_model_digest, model_digest
from tensorweave.workers.rank import RankWorker
from tensorweave.workers.store import model_store
from tests.workers.rank_orders import make_order

COMMIT = "8f3b2c1d" * 5


def write_model(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "model.safetensors").write_bytes(weights)
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub whose snapshots lie as huggingface_hub lays them; it keeps the revisions that it is asked for."""
    snapshot = write_model(tmp_path / "models--org--name" / "snapshots" / COMMIT)
    asked: dict[str, Any] = {"path": snapshot, "revisions": []}

    def get(hub_id: str, revision: str | None) -> Path:
        asked["revisions"].append(revision)
        return snapshot

    monkeypatch.setattr(model_store, "_hub_snapshot", get)
    return asked


def find(**fields: Any) -> PinnedModel:
    return PinnedModel.find(ServeConfig.model_validate(fields))


def test_a_hub_id_goes_to_every_host_with_the_commit_that_was_found(hub: dict[str, Any]) -> None:
    served = find(model="org/name", engine={"revision": "v2"}, pools={"prefill": {}, "decode": {}})
    assert hub["revisions"] == ["v2"]
    digest = model_digest(hub["path"])
    for spec in pool_specs(served.config, has_gpus=False, digests=served.digests):
        assert (spec.gang.args["model"], spec.gang.args["revision"]) == ("org/name", COMMIT)
        assert spec.gang.model_digest == digest
    assert served.config.model_name == "name"
    again = ServeConfig.from_plain(served.config.to_plain())
    assert (again.model, again.shared_args.revision) == ("org/name", COMMIT)


def test_a_models_commit_is_not_its_tokenizers(hub: dict[str, Any]) -> None:
    other = find(model="org/name", engine={"tokenizer": "org/other", "revision": "v2"}).config.shared_args
    assert (other.revision, other.tokenizer_revision) == (COMMIT, "v2")
    assert find(model="org/name", engine={"tokenizer": "org/other"}).config.shared_args.tokenizer_revision == "main"
    assert find(model="org/name").config.shared_args.tokenizer_revision is None


def test_a_fetchable_name_stays_a_name_and_a_directory_becomes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = write_model(tmp_path / "cache" / "smollm2")
    monkeypatch.setattr(model_store, "fetch", lambda model, cache_dir: cached)
    served = find(model="smollm2")
    assert (served.config.model, served.config.model_name) == ("smollm2-135m-instruct", "smollm2")
    assert served.digests == {"main": model_digest(cached)}
    monkeypatch.chdir(tmp_path)
    assert find(model="cache/smollm2").config.model == str(cached.resolve())


def test_a_directory_that_is_no_models_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json cannot be read: No such file"):
        find(model=str(tmp_path))


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    first, same = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    expected = model_digest(first)
    check_model_digest(same, "auto", expected)
    changed = write_model(tmp_path / "c", b"other!!")
    with pytest.raises(ValueError, match=rf"the model in {changed} differs from the one .* the same files"):
        check_model_digest(changed, "auto", expected)

    with pytest.raises(ValueError, match="differs from the one where the service was started"):
        RankWorker()._start(order(changed, expected))  # before anything is loaded: there is nothing that could be


def order(model: Path, digest: str) -> RankOrder:
    return make_order(args={"model": str(model), "device": "cpu"}, start_timeout_s=10.0, model_digest=digest)


@pytest.mark.parametrize(
    ("node_ips", "told"),
    [
        ({"n1": "10.0.0.1", "n2": "10.0.0.2"}, "rank 1 (pid 12 on 10.0.0.2): no model directory '/m'"),
        ({"n1": "10.0.0.1"}, "no model directory '/m'"),
    ],
)
def test_an_error_of_one_host_of_several_names_it(node_ips: dict[str, str], told: str) -> None:
    class Start:
        async def remote(self, order: RankOrder) -> None:
            if order.place.rank == 1:
                raise RayTaskError("start", "a stack", ValueError("no model directory '/m'"))

    class Rank:
        start = Start()

    last = list(node_ips)[-1]
    places = RankPlaces([RankPlace("n1", 11, 0.0), RankPlace(last, 12, 0.0)], node_ips)
    ranks: list[Any] = [Rank(), Rank()]
    start = GangStart("g", 1, GangSpec(mesh=Mesh(tensor=2)), ranks, places)
    with pytest.raises(ValueError, match="no model directory") as caught:
        asyncio.run(start.run())
    assert str(caught.value) == told
