"""How much memory this host has left: the machine's, or less if our cgroup, or one above it, has a limit.

Ranks check it before they load; the supervisor reads the out-of-memory kills when a rank has died. Both versions of
cgroups are supported, as /proc describes them; on systems without cgroups only the machine counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

PROC_SELF: Final = Path("/proc/self")
_UNLIMITED: Final = 1 << 60
"""Version 1 represents no limit by the largest number of pages."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """`available` bytes. `limited_by` names the cgroup whose limit that is; None if it is the machine's."""

    available: int
    limited_by: str | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """The directory of a memory cgroup, and the version of its files."""

    directory: Path
    is_second: bool

    def limit(self) -> int | None:
        limit = _read_number(self.directory / ("memory.max" if self.is_second else "memory.limit_in_bytes"))
        return None if limit is None or limit >= _UNLIMITED else limit

    def used(self) -> int:
        """Without the page cache, which the kernel frees before it kills."""
        usage = _read_number(self.directory / ("memory.current" if self.is_second else "memory.usage_in_bytes")) or 0
        prefix = "" if self.is_second else "total_"
        stat = _read_table(self.directory / "memory.stat")
        return max(0, usage - sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active")))

    def oom_kills(self) -> int:
        name = "memory.events" if self.is_second else "memory.oom_control"
        return _read_table(self.directory / name).get("oom_kill", 0)


def host_memory(proc: Path = PROC_SELF, machine_available: int | None = None) -> HostMemory:
    """In tests, `proc` and `machine_available` replace this process's /proc and the machine's memory."""
    least = HostMemory(psutil.virtual_memory().available if machine_available is None else machine_available)
    for group in _groups(proc):
        limit = group.limit()
        if limit is not None and (left := max(0, limit - group.used())) < least.available:
            least = HostMemory(left, f"a cgroup's limit of {limit / 2**30:.2f} GiB, {group.directory}")
    return least


def oom_kills(proc: Path = PROC_SELF) -> int:
    """How often the kernel has killed for lack of memory here: in our cgroups, or on the whole machine."""
    machine = _read_table(proc.parent / "vmstat").get("oom_kill", 0)
    return machine + sum(group.oom_kills() for group in _groups(proc))


def _groups(proc: Path) -> Iterator[_Group]:
    """Our cgroup first, then those above it, as far as they are visible."""
    for is_second, path in _paths(proc / "cgroup"):
        for root, mount in _mounts(proc / "mountinfo", is_second):
            inside = path.relative_to(root) if path.is_relative_to(root) else Path()
            directory = mount / inside
            while directory.is_relative_to(mount):
                if directory.is_dir():
                    yield _Group(directory, is_second)
                directory = directory.parent


def _paths(file: Path) -> Iterator[tuple[bool, Path]]:
    """The paths of this process in the hierarchies that count memory: (is version 2, path)."""
    for line in _lines(file):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield True, Path(path)
        elif "memory" in controllers.split(","):
            yield False, Path(path)


def _mounts(file: Path, is_second: bool) -> Iterator[tuple[Path, Path]]:
    """The first mount of that hierarchy, if it is mounted: (mounted part, mount point)."""
    for line in _lines(file):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == ("cgroup2" if is_second else "cgroup") and (is_second or "memory" in kind[-1].split(",")):
            yield Path(fields[3]), Path(fields[4])
            return


def _lines(file: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _read_number(file: Path) -> int | None:
    """None if there is no such file, or it says "max"."""
    text = "".join(_lines(file)[:1]).strip()
    return int(text) if text.isdigit() else None


def _read_table(file: Path) -> dict[str, int]:
    """A file of lines with a name and a number."""
    pairs = (line.split() for line in _lines(file))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
