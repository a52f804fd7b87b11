"""Runs one of Ray's agents for a raylet, and starts it again when it ends. `ray_internals.kept_agents` puts this
program between the two.

A raylet ends itself as soon as an agent of its node has ended, and with it everything that Ray runs there (Ray 2.60,
src/ray/raylet/agent_manager.cc: "The raylet fate shares with the agent"; no setting changes this). The agents keep
nothing that a new one would miss.

A program of its own without imports of ours: python -I -S ray_agent_keeper.py COMMAND...
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from pathlib import Path

QUICK_S = 15.0
"""An agent that ends sooner than this has failed to start."""
MOST_QUICK_ENDS = 5
"""After so many of them in a row this program ends, too, as the agent did, and with it the node."""
PAUSE_S = 1.0
_PARENT = "RAY_RAYLET_PID"  # an agent ends itself unless its parent is this process
_PORTS = {
    "--grpc-port": "metrics_agent_port",
    "--metrics-export-port": "metrics_export_port",
    "--listen-port": "dashboard_agent_listen_port",
    "--runtime-env-agent-port": "runtime_env_agent_port",
}
"""Options of the agents, and the files of the session in which the raylet looks for the ports that they have."""


def main(command: list[str]) -> int:
    """Return the agent's exit code once the raylet, or one agent after the other, has ended."""
    raylet = os.pidfd_open(os.getppid())
    command = with_ports(command)
    num_quick_ends = 0
    while True:
        started_s = time.monotonic()
        code = run(command, raylet)
        if has_ended(raylet):
            return 0
        num_quick_ends = num_quick_ends + 1 if time.monotonic() - started_s < QUICK_S else 0
        name = Path(next((part for part in command if part.endswith(".py")), command[0])).as_posix()
        print(f"{name} has ended (code {code})", file=sys.stderr, flush=True)
        if num_quick_ends >= MOST_QUICK_ENDS:
            return code if 0 < code < 256 else 1
        time.sleep(PAUSE_S)


def run(command: list[str], raylet: int) -> int:
    """Until the agent or the raylet has ended. An agent without its raylet reports that to the drivers and ends, once
    this process has ended, too."""
    agent = os.posix_spawn(command[0], command, {**os.environ, _PARENT: str(os.getpid())})
    agent_end = os.pidfd_open(agent)
    try:
        poll = select.poll()
        for descriptor in (agent_end, raylet):
            poll.register(descriptor, select.POLLIN)
        poll.poll()
        return os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]) if has_ended(agent_end) else 0
    finally:
        os.close(agent_end)


def has_ended(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def with_ports(command: list[str]) -> list[str]:
    """The same command with ports chosen here, where it has 0 or one that is taken. Every agent of this node then uses
    them: the raylet and the workers know only the first ones. They are written where the raylet looks for them, which
    it does for 28 s alone; a busy host takes longer to start an agent."""
    if "--minimal" in command:  # an agent of a Ray without its dashboard, which serves no port and writes that itself
        return command
    options = dict(part.split("=", 1) for part in command if part.startswith("--") and "=" in part)
    chosen = {option: free_port(int(options[option])) for option in _PORTS if option in options}
    for option, port in chosen.items():
        write(Path(options["--session-dir"]) / f"{_PORTS[option]}_{options['--node-id']}", str(port))
    return [f"{option}={chosen[option]}" if (option := part.split("=")[0]) in chosen else part for part in command]


def free_port(wanted: int) -> int:
    """`wanted`, unless that is 0 or taken."""
    with socket.socket() as probe:
        try:
            probe.bind(("", wanted))
        except OSError:
            return free_port(0)
        return int(probe.getsockname()[1])


def write(path: Path, text: str) -> None:
    """Write the file at once, so that nobody reads half of it."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
