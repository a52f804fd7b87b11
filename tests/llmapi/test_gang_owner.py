"""The resources of an LLM's ranks are free again once the owner of the LLM has ended, in whatever way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tensorweave import LLM, SamplingParams
from tensorweave.cluster.ray_session import start_or_join_ray
from tests.llmapi.small_llm import CACHE, write_small_model

PATIENCE_S = 120.0
NUM_CPUS = 4


class Holder:
    """An actor with an LLM over two ranks."""

    def __init__(self, directory: str) -> None:
        self._llm = LLM(directory, tensor_parallel_size=2, dtype="float32", kv_cache_config=CACHE, num_threads=1)

    def pid(self) -> int:
        return os.getpid()

    def generate(self) -> Any:
        return self._llm.generate([9, 8, 7], SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.fixture
def cluster() -> Iterator[None]:
    with start_or_join_ray(num_cpus=NUM_CPUS):
        yield


def wait_free(num_cpus: int) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while (free := ray.available_resources().get("CPU", 0.0)) != num_cpus:
        assert time.monotonic() < give_up_s, f"{free:g} CPUs are free, not {num_cpus}"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_an_llm_has_placed_goes_with_its_owner(cluster: None, tmp_path: Path) -> None:
    directory = str(write_small_model(tmp_path))
    actor = ray.remote(Holder).options(num_cpus=0)
    killed, dropped = (actor.remote(directory) for _ in range(2))
    outputs = ray.get([each.generate.remote() for each in (killed, dropped)], timeout=PATIENCE_S)
    assert [(output.finished, output.outputs[0].length) for output in outputs] == [(True, 4)] * 2, "sent by the actors"
    wait_free(0)
    del dropped
    wait_free(2)
    os.kill(ray.get(killed.pid.remote()), signal.SIGKILL)
    wait_free(NUM_CPUS)
    assert {row["state"] for row in ray.util.placement_group_table().values()} == {"REMOVED"}
