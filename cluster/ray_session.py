"""Ray for this process: join the cluster that is there, or start a private one on loopback and end it again.

Called by the LLM class and by deploy. It stops only what it has started, and sends no usage data.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import ray

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.ray_address import check_ray_address
from tensorweave.cluster.ray_auth import OPEN_RAY, asks_for_token, forget_token, token_mode
from tensorweave.cluster.ray_forks import spare_ray_in_forks
from tensorweave.cluster.ray_internals import in_own_process_groups, log_folder, on_free_agent_port, on_loopback
from tensorweave.cluster.sentences import sentence_of
from tensorweave.cluster.session_disk import why_no_room

_JOB_CONFIG: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PATH: Final = "PYTHONPATH"
_OBJECT_STORE_BYTES: Final = 128 << 20
"""No prompt, token or tensor of ours is a Ray object: the store may be small."""


class RayFailed(TensorweaveError):
    """Ray does not start, or cannot be joined."""

    code = "ray_failed"


def cluster_has_gpus() -> bool:
    """Some node of the Ray cluster that this process has joined offers GPUs."""
    return bool(ray.cluster_resources().get("GPU", 0))


class RaySession:
    """A connection to Ray; `close` ends it, and the cluster too where it is ours."""

    def __init__(self, *, is_owner: bool, is_private: bool) -> None:
        self._is_owner = is_owner
        self.is_private = is_private

    @property
    def has_gpus(self) -> bool:
        """Some node of the cluster offers GPUs."""
        return cluster_has_gpus()

    def warn_if_open(self) -> None:
        """Warn where the cluster is somebody else's and asks nobody for a token."""
        if not self.is_private and not asks_for_token(ray.get_runtime_context().gcs_address):
            warnings.warn(OPEN_RAY, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        if self._is_owner and ray.is_initialized():
            ray.shutdown()
            if self.is_private:
                forget_token()
        self._is_owner = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def will_start_ray(address: str | None = None) -> bool:
    """Whether `start_or_join_ray` would start a private cluster, on this host."""
    return not ray.is_initialized() and _address_of(address) is None


def start_or_join_ray(address: str | None = None, *, num_cpus: float = 1.0, namespace: str | None = None) -> RaySession:
    """Join the cluster at `address` (or `RAY_ADDRESS`), else start a private one that has at least `num_cpus`.

    CPUs are Ray's count of slots, not cores: a private cluster has enough for its gangs even on a small machine. It has
    a token of its own (`cluster.ray_auth`).

    Raises:
        ConnectionError: there is no cluster at the address, or it does not let us in.
        RayFailed: Ray does not start or cannot be joined, for another reason, for example a full disk.
    """
    if ray.is_initialized():
        return RaySession(is_owner=False, is_private=False)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    spare_ray_in_forks()
    address = _address_of(address)
    common: dict[str, Any] = {"namespace": namespace, "logging_level": logging.WARNING}
    if address is not None:
        with _naming_failures(f"Ray at {address} cannot be joined"):
            check_ray_address(address)
            ray.init(address=address, runtime_env=_worker_environment(), **common)
        return RaySession(is_owner=True, is_private=False)
    if (why := why_no_room()) is not None:
        raise RayFailed(f"Ray cannot be started: {why}")
    with (
        _naming_failures("Ray cannot be started"),
        token_mode(),
        on_loopback(),
        _on_our_path(),
        in_own_process_groups(),
        on_free_agent_port(),
    ):
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(num_cpus)),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **common,
        )
    return RaySession(is_owner=True, is_private=True)


def _address_of(address: str | None) -> str | None:
    """The address of the cluster to join; None: there is none."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def import_root() -> str:
    """The folder that holds the `tensorweave` package, as this process found it."""
    return str(Path(__file__).absolute().parents[2])


@contextlib.contextmanager
def _naming_failures(what: str) -> Iterator[None]:
    """Ray says little, in bare exceptions: say what it was about, and where its own logs are."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:  # what Ray raises has no common class
        raise RayFailed(f"{what}: {sentence_of(error)} (Ray's own logs, on its hosts: {log_folder()})") from error


def _worker_environment() -> dict[str, Any] | None:
    """Workers import what we import. A submitted job's own environment already sees to that (`--working-dir`)."""
    return None if _JOB_CONFIG in os.environ else {"env_vars": {_PATH: _python_path()}}


@contextlib.contextmanager
def _on_our_path() -> Iterator[None]:
    """The same for the cluster that is started inside, whose workers inherit it. With a runtime environment of the job,
    the first actors could not use the workers that Ray starts beforehand, and would start their own."""
    before = os.environ.get(_PATH)
    os.environ[_PATH] = _python_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PATH]
        else:
            os.environ[_PATH] = before


def _python_path() -> str:
    paths = [import_root(), *filter(None, os.environ.get(_PATH, "").split(os.pathsep))]
    return os.pathsep.join(dict.fromkeys(paths))
