"""The fields of the `ray.io/v1` resources of KubeRay, after its published API reference (v1.6).

Its CRDs are not in a package registry: manifests are checked against this, and pods and all else that is Kubernetes'
own against the schemas of Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

Fields = Mapping[str, Any]

_GROUP: Final[Fields] = {
    "rayStartParams": {str: str},
    "resources": {str: str},
    "labels": {str: str},
    "template": "PodTemplateSpec",
}
_AUTOSCALER: Final[Fields] = {
    "version": ("v1", "v2"),
    "upscalingMode": ("Default", "Aggressive", "Conservative"),
    "idleTimeoutSeconds": int,
    "image": str,
    "imagePullPolicy": str,
}
RAY_CLUSTER: Final[Fields] = {
    "rayVersion": str,
    "authOptions": {"mode": ("disabled", "token"), "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": _AUTOSCALER,
    "suspend": bool,
    "headServiceAnnotations": {str: str},
    "headGroupSpec": {
        **_GROUP,
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
        "headService": "Service",
        "enableIngress": bool,
    },
    "workerGroupSpecs": [
        {
            **_GROUP,
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "suspend": bool,
            "idleTimeoutSeconds": int,
        }
    ],
}
RAY_SERVICE: Final[Fields] = {
    "serveConfigV2": str,
    "rayClusterConfig": RAY_CLUSTER,
    "serveService": "Service",
    "excludeHeadPodFromServeSvc": bool,
    "rayClusterDeletionDelaySeconds": int,
    "upgradeStrategy": {"type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")},
}
KINDS: Final = {"RayCluster": RAY_CLUSTER, "RayService": RAY_SERVICE}


def mistakes(value: Any, kind: Any, path: str = "spec") -> Iterator[str]:
    """What of `value` KubeRay would refuse or drop."""
    match kind:
        case str():  # Kubernetes' own, checked elsewhere
            return
        case type():
            if type(value) is not kind:
                yield f"{path}: {value!r} is no {kind.__name__}"
        case tuple():
            if value not in kind:
                yield f"{path}: {value!r} is none of {kind}"
        case [item]:
            for number, each in enumerate(value):
                yield from mistakes(each, item, f"{path}[{number}]")
        case dict() if str in kind:
            for key, each in value.items():
                yield from mistakes(each, kind[str], f"{path}.{key}")
        case dict():
            for key, each in value.items():
                if key not in kind:
                    yield f"{path}.{key}: there is no such field"
                else:
                    yield from mistakes(each, kind[key], f"{path}.{key}")


def pod_templates(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = spec.get("rayClusterConfig", spec)
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())):
        yield group["template"]
