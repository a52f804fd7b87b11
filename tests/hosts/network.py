"""Three hosts on this machine: network namespaces on a bridge, each with its own name, processes, /tmp and /dev/shm.

Needs root and iproute2. Traffic goes to the hosts' addresses and loopback only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

NET = "10.79.0"
BRIDGE = "twcbr0"
OUTSIDE = f"{NET}.1"
NEEDED = ("ip", "tc", "nsenter", "unshare")
SWITCH = "TENSORWEAVE_TEST_CLUSTER"
ROOT = Path(__file__).resolve().parents[2]

# The first process of a host reaps what others leave, and ends the host with itself.
_INIT = """
hostname "$0"; mount --bind "$1/$0/tmp" /tmp; mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/resolv.conf" /etc/resolv.conf
touch "$1/$0/up"; trap : TERM; while :; do sleep 3600 & wait $!; done
"""


def why_not() -> str:
    """Why such hosts cannot be made here; empty if they can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.environ.get(SWITCH) != "1":
        return f"makes network namespaces and takes minutes: `make test-cluster` (or {SWITCH}=1) runs it"
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid():
        return "needs root"
    return f"this clone is below /tmp, which each host has of its own: {ROOT}" if ROOT.is_relative_to("/tmp") else ""


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=30)


class Host:
    """One of them; `lose` is a power cut, `revive` turns it on again."""

    def __init__(self, number: int, root: Path) -> None:
        self.name = f"twc{number}"
        self.address = f"{NET}.{10 + number}"
        self.veth = f"twcv{number}"
        self.root = root
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def tmp(self) -> Path:
        """What is /tmp on the host."""
        return self.root / self.name / "tmp"

    @property
    def first_pid(self) -> int:
        """The host's first process, as this machine numbers it."""
        assert self._process is not None, f"{self.name} is down"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])

    def plug_in(self) -> None:
        command("ip", "netns", "add", self.name)
        command("ip", "link", "add", self.veth, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        command("ip", "link", "set", self.veth, "master", BRIDGE, "up")
        command("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            command("ip", "-n", self.name, "link", "set", device, "up")

    def unplug(self) -> None:
        for arguments in (("netns", "del", self.name), ("link", "del", self.veth)):
            subprocess.run(["ip", *arguments], capture_output=True, timeout=30)

    def revive(self) -> None:
        shutil.rmtree(self.root / self.name, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        self.tmp.chmod(0o1777)
        spaces = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        enter = ("nsenter", f"--net=/run/netns/{self.name}", "unshare", *spaces)
        first = (*enter, "bash", "-c", _INIT, self.name, str(self.root))
        self._process = subprocess.Popen(first, start_new_session=True)
        end_s = time.monotonic() + 30
        while not (self.root / self.name / "up").exists():
            assert self._process.poll() is None, f"{self.name} ends at once"
            assert time.monotonic() < end_s, f"{self.name} does not come up"
            time.sleep(0.05)
        self.set_link(is_up=True)

    def lose(self) -> None:
        """Without a word to anybody: its link is down before its processes end."""
        self.set_link(is_up=False)
        self.end()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            self._process = None

    def set_link(self, *, is_up: bool) -> None:
        command("ip", "link", "set", self.veth, "up" if is_up else "down")

    def throttle(self, rate: str | None) -> None:
        """In both directions; None: no more."""
        for prefix, device in ((("tc",), self.veth), (("tc", "-n", self.name), "eth0")):
            subprocess.run([*prefix, "qdisc", "del", "dev", device, "root"], capture_output=True, timeout=30)
            if rate is not None:
                shape = ("tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
                command(*prefix, "qdisc", "add", "dev", device, "root", *shape)

    def enter(self, *arguments: str) -> list[str]:
        """The command that runs `arguments` on this host, in this directory."""
        spaces = ["--mount", "--uts", "--net", "--pid"]
        return ["nsenter", f"--target={self.first_pid}", *spaces, f"--wdns={Path.cwd()}", *arguments]

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """A process that ends with the host at the latest."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.enter(*arguments),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float = 120) -> str:
        """What it prints. Raises AssertionError unless it succeeds."""
        done = subprocess.run(
            self.enter(*arguments), env=dict(environment), capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{' '.join(arguments)} on {self.name}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """The host's processes, as this machine numbers them, but for its first ones, and their command lines."""
        inode = os.stat(f"/run/netns/{self.name}").st_ino
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    is_here = os.stat(entry / "ns" / "net").st_ino == inode
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if is_here and line and not line.startswith(("bash -c", "sleep", "unshare", "nsenter")):
                        found[int(entry.name)] = line
        return found

    def find(self, part: str) -> list[int]:
        """The processes whose command line has `part`."""
        return [pid for pid, line in self.processes().items() if part in line]

    def kill(self, part: str) -> int:
        """SIGKILL to the processes whose command line has `part`; how many there were."""
        pids = self.find(part)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)


class Network:
    """The bridge and its hosts, up. Everything is gone at the end of the context."""

    def __init__(self, count: int = 3) -> None:
        # Not under /tmp, which every host has of its own.
        self.root = Path(tempfile.mkdtemp(prefix="twhosts.", dir="/var/tmp"))
        self.root.chmod(0o755)
        self.hosts = [Host(number, self.root) for number in range(1, count + 1)]

    def __enter__(self) -> Self:
        try:
            names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
            (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{OUTSIDE} outside\n{names}")
            (self.root / "resolv.conf").write_text("options timeout:1 attempts:1\n")
            command("ip", "link", "add", BRIDGE, "type", "bridge")
            command("ip", "addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
            command("ip", "link", "set", BRIDGE, "up")
            for host in self.hosts:
                host.plug_in()
                host.revive()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        for host in self.hosts:
            host.end()
            host.unplug()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, timeout=30)
        shutil.rmtree(self.root, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
