"""What Ray shows at a driver of its processes' output, as JSON lines if the log is to be JSON.

Lines of ours are JSON already and are passed on; any other line becomes the message of an object.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tensorweave.cluster.log_setup import json_entry


def print_as_json(data: dict[str, Any]) -> None:
    stream = sys.stderr if data.get("is_err") else sys.stdout
    for line in data["lines"]:
        print(as_json(line, data), file=stream, flush=True)


def as_json(line: str, data: dict[str, Any]) -> str:
    if line.startswith('{"time": ') and line.endswith("}"):
        return line
    entry = json_entry(time.time(), "INFO", "ray", line.rstrip("\n"))
    process = data.get("actor_name") or data.get("task_name") or "ray"
    return json.dumps({**entry, "process": str(process), "pid": data.get("pid"), "host": data.get("ip")}, default=str)
