"""The manifests for Kubernetes and the Dockerfile: fields that exist, a valid configuration, our versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

import tensorweave
from tensorweave.deploy.config import ServeConfig, load_config
from tests.deploy.kuberay_fields import KINDS, mistakes, pod_templates

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RAY = next(Requirement(text) for text in PROJECT["dependencies"] if text.startswith("ray["))
CHART = DEPLOY / "helm"
HELM = shutil.which("helm")


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, document


RAYS = [pytest.param(document, id=f"{name}-{document['kind']}") for name, document in documents() if "spec" in document]


def test_every_manifest_has_resources_of_kuberay() -> None:
    assert [path.name for path in MANIFESTS] == ["raycluster.yaml", "rayservice.yaml"]
    assert [document.values[0]["kind"] for document in RAYS] == ["RayCluster", "RayService"]  # type: ignore[index]


@pytest.mark.parametrize("document", RAYS)
def test_kuberay_knows_every_field(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert list(mistakes(document["spec"], KINDS[document["kind"]])) == []


def test_wrong_fields_are_found() -> None:
    spec = {"rayVersion": 2.6, "authOptions": {"mode": "basic"}, "workerGroupSpecs": [{"replica": 1}], "headGroup": {}}
    assert list(mistakes(spec, KINDS["RayCluster"])) == [
        "spec.rayVersion: 2.6 is no str",
        "spec.authOptions.mode: 'basic' is none of ('disabled', 'token')",
        "spec.workerGroupSpecs[0].replica: there is no such field",
        "spec.headGroup: there is no such field",
    ]


@pytest.mark.parametrize("document", RAYS)
def test_kubernetes_accepts_the_pods(document: dict[str, Any]) -> None:
    for template in pod_templates(document["spec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_accepts_the_other_resources() -> None:
    others = [document for _, document in documents() if "spec" not in document]
    assert [document["kind"] for document in others] == ["ConfigMap"]
    for document in others:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("document", RAYS)
def test_versions_of_ray_are_ours(document: dict[str, Any]) -> None:
    spec = document["spec"].get("rayClusterConfig", document["spec"])
    assert RAY.specifier.contains(str(spec["rayVersion"]))
    assert spec["authOptions"] == {"mode": "token"}


def service(tmp_path: Path) -> tuple[ServeConfig, dict[str, Any]]:
    """The configuration and the Serve file of rayservice.yaml."""
    by_kind = {document["kind"]: document for name, document in documents() if name == "rayservice.yaml"}
    [(name, text)] = by_kind["ConfigMap"]["data"].items()
    (tmp_path / name).write_text(text)
    return load_config(tmp_path / name), by_kind["RayService"]["spec"]


def test_the_service_is_one_of_ours(tmp_path: Path) -> None:
    config, spec = service(tmp_path)
    [application] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    source = DEPLOY / f"{module.removeprefix('tensorweave.deploy.')}.py"
    assert f"def {function}(" in source.read_text(encoding="utf-8")
    assert application["args"]["config"] == "/etc/tensorweave/service.yaml"
    cluster = spec["rayClusterConfig"]
    [mount] = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == "/etc/tensorweave"
    replicas = {tuple(group["labels"].items()): group["maxReplicas"] for group in cluster["workerGroupSpecs"]}
    for pool in config.pools.values():
        assert replicas[tuple(pool.placement.labels.items())] >= pool.replicas


def test_the_image_has_both_targets_and_our_versions() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE) == ["cpu", "cuda"]
    [ray] = re.findall(r"^ARG RAY_VERSION=(.*)$", text, re.MULTILINE)
    assert RAY.specifier.contains(ray)
    torch = next(text for text in PROJECT["dependencies"] if text.startswith("torch"))
    assert text.count(f"'{torch}'") == 2
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert extra in PROJECT["optional-dependencies"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {"pyproject.toml", "constraints.txt", "tensorweave", "deploy"} & set(ignored)


# ---- the chart


def test_the_chart_is_of_this_version_and_uses_each_of_its_values() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    [template] = (CHART / "templates").iterdir()
    used = set(re.findall(r"\.Values\.(\w+)", template.read_text(encoding="utf-8")))
    assert used == set(values)
    assert chart["appVersion"] == tensorweave.__version__
    assert RAY.specifier.contains(values["rayVersion"])


@pytest.mark.skipif(HELM is None, reason="helm is not installed")
@pytest.mark.parametrize("pools", ["", "pools.prefill=null,pools.decode.replicas=3,pools.decode.args.role=both"])
def test_the_chart_is_the_manifest_of_a_service(tmp_path: Path, pools: str) -> None:
    assert HELM is not None
    subprocess.run([HELM, "lint", "--strict", CHART], check=True, capture_output=True, timeout=60)
    command = [HELM, "template", "chat", CHART, *(["--set", pools] if pools else [])]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    by_kind = {document["kind"]: document for document in yaml.safe_load_all(text)}
    spec = by_kind["RayService"]["spec"]
    assert list(mistakes(spec, KINDS["RayService"])) == []
    for template in pod_templates(spec):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    path = tmp_path / "service.yaml"
    path.write_text(by_kind["ConfigMap"]["data"]["service.yaml"])
    assert load_config(path).pools.keys() == {
        group["labels"]["pool"] for group in spec["rayClusterConfig"]["workerGroupSpecs"]
    }
