"""What a host has left: the machine's memory, or what a cgroup's limit leaves, of either version, ours or one above."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError

from tensorweave.cluster import memory_kills
from tensorweave.cluster.host_memory import host_memory, oom_kills
from tensorweave.cluster.memory_kills import describe_kills, describe_local_kills, is_memory_kill
from tensorweave.cluster.ranks import RankPlace

GIB = 1 << 30
FIRST = {
    "limit": "memory.limit_in_bytes",
    "usage": "memory.usage_in_bytes",
    "stat": "total_inactive_file",
    "kills": "memory.oom_control",
}
SECOND = {"limit": "memory.max", "usage": "memory.current", "stat": "inactive_file", "kills": "memory.events"}


class FakeHost:
    """A /proc and cgroups of files. `root`: which part of the hierarchy is mounted, as containers see it."""

    def __init__(self, directory: Path, *, is_second: bool, path: str = "/pod/box", root: str = "/") -> None:
        self.names = SECOND if is_second else FIRST
        self.mount = directory / "sys" / "memory"
        self.mount.mkdir(parents=True)
        self.proc = directory / "proc" / "self"
        self.proc.mkdir(parents=True)
        entry = f"0::{path}" if is_second else f"4:cpu,memory:{path}"
        (self.proc / "cgroup").write_text(f"9:name=systemd:/\n{entry}\n")
        kind = "cgroup2 cgroup rw" if is_second else "cgroup cgroup rw,cpu,memory"
        (self.proc / "mountinfo").write_text(
            f"29 1 0:26 / /elsewhere rw - cgroup cgroup rw,blkio\n35 31 0:32 {root} {self.mount} rw,relatime - {kind}\n"
        )

    def group(self, path: str, limit: int | str, usage: int, cache: int = 0, kills: int = 0) -> None:
        directory = self.mount / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.names["limit"]).write_text(f"{limit}\n")
        (directory / self.names["usage"]).write_text(f"{usage}\n")
        (directory / "memory.stat").write_text(f"anon 5\n{self.names['stat']} {cache}\n")
        (directory / self.names["kills"]).write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")


@pytest.mark.parametrize("is_second", [False, True])
def test_a_cgroup_limit_ignores_the_page_cache(tmp_path: Path, is_second: bool) -> None:
    host = FakeHost(tmp_path, is_second=is_second)
    host.group("pod/box", 5 * GIB // 2, 2 * GIB, cache=GIB)
    memory = host_memory(host.proc, 21 * GIB)
    assert memory.available == 3 * GIB // 2
    assert memory.limited_by == f"a cgroup's limit of 2.50 GiB, {host.mount}/pod/box"


@pytest.mark.parametrize("is_second", [False, True])
def test_the_smallest_limit_applies(tmp_path: Path, is_second: bool) -> None:
    host = FakeHost(tmp_path, is_second=is_second)
    unlimited: int | str = "max" if is_second else 9223372036854771712
    host.group("pod/box", unlimited, GIB)
    host.group("pod", 8 * GIB, 7 * GIB)
    host.group("", unlimited, 9 * GIB)
    memory = host_memory(host.proc, 21 * GIB)
    assert memory.available == GIB
    assert memory.limited_by is not None
    assert memory.limited_by.endswith("/pod")
    assert host_memory(host.proc, GIB // 2).available == GIB // 2
    assert host_memory(host.proc, GIB // 2).limited_by is None


@pytest.mark.parametrize("is_second", [False, True])
def test_a_container_sees_its_own_part_of_the_hierarchy(tmp_path: Path, is_second: bool) -> None:
    host = FakeHost(tmp_path, is_second=is_second, path="/docker/f00", root="/docker/f00")
    host.group("", 2 * GIB, GIB)
    assert host_memory(host.proc, 21 * GIB).available == GIB
    hidden = FakeHost(tmp_path / "hidden", is_second=is_second, path="/docker/f00", root="/")
    hidden.group("", 2 * GIB, GIB)  # our path is not there, the mount is
    assert host_memory(hidden.proc, 21 * GIB).available == GIB


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "proc", 7 * GIB).available == 7 * GIB
    assert oom_kills(tmp_path / "proc") == 0
    assert host_memory().available > 0  # of this very process


@pytest.mark.parametrize("is_second", [False, True])
def test_kills_are_counted(tmp_path: Path, is_second: bool) -> None:
    host = FakeHost(tmp_path, is_second=is_second)
    host.group("pod/box", GIB, GIB, kills=2)
    assert oom_kills(host.proc) == 2
    (host.proc.parent / "vmstat").write_text("pgfault 9\noom_kill 3\n")
    assert oom_kills(host.proc) == 5


class _Context:
    def get_node_id(self) -> str:
        return "n1"


def test_a_kill_for_lack_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"n2": 3}

    async def ask(node_id: str) -> int:
        return counts.get(node_id, 0)

    monkeypatch.setattr(ray, "get_runtime_context", _Context)
    monkeypatch.setattr(memory_kills, "oom_kills", lambda: 1)
    before = [RankPlace("n1", 1, 0.0, oom_kills=1), RankPlace("n2", 2, 0.0, oom_kills=3)]
    after = [RankPlace("n1", 1, 0.0, oom_kills=0), RankPlace("n2", 2, 0.0, oom_kills=2)]
    assert describe_local_kills(before) == ""
    assert "for lack of memory" in describe_local_kills(after[:1])
    assert describe_local_kills(after[1:]) == ""

    monkeypatch.setattr(memory_kills, "_count_kills", ask)
    assert asyncio.run(describe_kills(before)) == ""
    assert "for lack of memory" in asyncio.run(describe_kills(after[1:]))


def test_rays_message_is_recognized() -> None:
    assert is_memory_kill(OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."))
    assert not is_memory_kill(ActorDiedError())
