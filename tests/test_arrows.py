"""Who may import whom, between rooms and between a room's folders; where torch and ray may be imported; no unpickling.

Every Python file is parsed, never imported. The self-tests at the end show that each rule catches what it is for.
`test_import_circles.py` looks at single modules.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parsed import parsed

ROOT = Path(__file__).resolve().parent.parent
TABLE = "tests/test_arrows.py"
ROOMS = ("cluster", "workers", "router", "kernels", "deploy")
FRONT = "tensorweave"  # the public names of tensorweave/__init__.py

# Each place to the places it may import from, besides itself.
ARROWS: dict[str, frozenset[str]] = {
    FRONT: frozenset({"llmapi", "cluster"}),
    "cli": frozenset({FRONT, "llmapi", "deploy", "router", "cluster", "workers", "kernels"}),
    "llmapi": frozenset({"deploy", "router", "cluster", "workers"}),
    "deploy": frozenset({"router", "workers", "cluster"}),
    "router": frozenset({"cluster"}),
    "workers": frozenset({"cluster", "kernels"}),
    "cluster": frozenset(),
    "kernels": frozenset(),
}
# Inside a room: each folder to the other folders that it may import from. A file that lies on another level than the
# rest of its folder has a line of its own. Lower levels stand first. Renamed or moved: edit the names here.
INNER_ARROWS: dict[str, dict[str, str]] = {
    "router": {
        "time_slice.py": "",
        "deadline.py": "",
        "garbage_collection.py": "",
        "http/body_memory.py": "",
        "dispatch": "deadline.py",
        "http/request_record.py": "dispatch",
        "sampling": "",
        "guided": "",
        "chat_formats": "guided",
        "text": "dispatch",
        "chat": "chat_formats text",
        "openai": "chat chat_formats guided sampling text time_slice.py",
        "anthropic": "chat openai sampling text",
        "responses": "chat openai text",
        "bodies": "anthropic chat guided openai responses sampling text",
        "service.py": "bodies chat chat_formats dispatch guided http/body_memory.py http/request_record.py openai text",
        "openai/new_answer.py": "anthropic bodies openai responses service.py",
        "openai/prepare.py": "bodies chat openai openai/new_answer.py sampling service.py text",
        "http": "anthropic bodies deadline.py dispatch http/body_memory.py http/request_record.py openai "
        "openai/prepare.py responses "
        "service.py text time_slice.py",
        "admin": "http http/body_memory.py openai",
    },
    "workers": {
        "start_log.py": "",
        "gang": "",
        "store": "",
        "leader": "",
        "step": "",
        "guided": "gang step",
        "sampling": "step",
        "speculation": "gang sampling step",
        "kv": "step",
        "models": "gang",
        "engine_dir": "gang models store",
        "lora": "gang models step",
        "engine": "engine_dir gang lora models start_log.py step store",
        "autodeploy": "engine engine_dir gang models step store",
        "transfer": "engine gang step",
        "executor": "engine gang guided lora sampling step",
        "build_transfers.py": "engine engine_dir gang models step store transfer",
        "build.py": "autodeploy build_transfers.py engine engine_dir executor gang guided kv lora models sampling "
        "speculation start_log.py step store",
        "rank_process.py": "",
        "rank.py": "build.py engine_dir executor gang leader rank_process.py sampling start_log.py step store transfer",
        "fakes": "engine executor gang kv rank.py sampling step",
    },
    "workers/transfer": {
        "block_part.py": "",
        "expected_rate.py": "",
        "transports/peer_sockets.py": "",
        "transports/frame_connection.py": "transports/peer_sockets.py",
        "read_request.py": "",
        "window.py": "",
        "block_sink.py": "block_part.py read_request.py",
        "fingerprint.py": "window.py",
        "transports/loader.py": "window.py",
        "sending/offered_blocks.py": "block_part.py read_request.py transports/loader.py window.py",
        "sending/block_cursor.py": "block_part.py read_request.py sending/offered_blocks.py transports/loader.py"
        " window.py",
        "carrier.py": "block_sink.py read_request.py sending/offered_blocks.py",
        "transfer_stats.py": "carrier.py",
        "transports": "block_part.py block_sink.py expected_rate.py read_request.py sending/block_cursor.py"
        " transports/frame_connection.py transports/loader.py window.py",
        "sending": "block_part.py fingerprint.py read_request.py carrier.py sending/block_cursor.py"
        " sending/offered_blocks.py transports/loader.py window.py",
        "carriers": "block_part.py block_sink.py read_request.py carrier.py sending/block_cursor.py"
        " transports/frame_connection.py transports/peer_sockets.py sending sending/offered_blocks.py transports"
        " transports/loader.py window.py",
        "receiving": "block_part.py block_sink.py fingerprint.py read_request.py carrier.py sending"
        " sending/offered_blocks.py transfer_stats.py window.py",
        "transfers.py": "expected_rate.py fingerprint.py read_request.py carrier.py sending receiving"
        " transfer_stats.py window.py",
    },
}
CIRCLES = frozenset({("tensorweave/llmapi/output_iterator.py", "tensorweave.llmapi.outputs.RequestOutput")})
"""(File, import) pairs that close a circle and may: the iterator of an object, which knows the object's type."""
TORCH_PLACES = frozenset({"workers", "kernels"})
TORCH_FILES = frozenset(
    {
        "tensorweave/cli/bench_transfer_fetches.py",
        "tensorweave/cli/bench_transfer_sockets.py",
        "tensorweave/cli/suite_rates.py",
        "tensorweave/cli/trace_profiler.py",
    }
)
"""Benchmarks that act as two ranks, or measure a device; the command line imports them only when they run."""
RAY_PLACES = frozenset({"cluster", "router", "deploy"})
RAY_FILES = frozenset({"workers/rank.py"})
PARENT_AND_CHILD = frozenset({"router/bodies/pool.py", "router/bodies/worker.py"})
"""A child reads what its own parent pickled, from a pipe that nobody else can write to; never the other way round."""
UNPICKLERS = frozenset({"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function) in ("importlib.import_module", "import_module", "__import__"):
                    yield node.lineno, name


def place_of(path: str) -> str | None:
    """The room (or `llmapi`, `cli`, the front) that a file belongs to; None for tests and scripts."""
    parts = Path(path).parts
    if parts[0] == "tensorweave":
        return parts[1] if len(parts) > 2 else FRONT
    return parts[0] if parts[0] in ROOMS else None


def broken_rules(path: str, source: str) -> list[str]:
    place, problems = place_of(path), []
    tree = parsed(source, path)
    for line, name in imported_modules(tree):
        if problem := _import_problem(path, place, name):
            problems.append(f"{path}:{line}: {problem}")
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.load"]
    if place is not None:
        problems += [f"{path}:{node.lineno}: torch.load unpickles; read safetensors" for node in loads]
    return problems


def _import_problem(path: str, place: str | None, name: str) -> str | None:
    top, *rest = name.split(".")
    if name.startswith("."):
        return f"relative import {name}; write tensorweave.room.module"
    if top in ROOMS:
        return f"bare room {name}; write tensorweave.{name}"
    if place is None:
        return None
    if UNPICKLERS & {top, *rest} and path not in PARENT_AND_CHILD:
        return f"{name}: nothing is pickled or unpickled by hand"
    if top == "torch" and place not in TORCH_PLACES and path not in TORCH_FILES:
        return f"torch in {place}"
    if top == "ray" and place not in RAY_PLACES and path not in RAY_FILES:
        return f"ray in {place}"
    if top == "tensorweave":
        target = rest[0] if rest and (rest[0] in ROOMS or rest[0] in ARROWS) else FRONT
        if target != place and target not in ARROWS[place]:
            return f"{place} may not import {target} ({name})"
        return _inner_problem(path, name)
    return None


def _inner_problem(path: str, name: str) -> str | None:
    """What `INNER_ARROWS` says of an import within a room."""
    imported = "/".join(name.split(".")[1:])
    for top, arrows in INNER_ARROWS.items():
        if (path, name) in CIRCLES or not (path.startswith(f"{top}/") and imported.startswith(f"{top}/")):
            continue
        place, target = inner_place(path.removesuffix(".py"), top), inner_place(imported, top)
        if place is None or target is None:
            return f"{imported if place else path}: add a line for it to INNER_ARROWS[{top!r}] in {TABLE}"
        if target != place and target not in arrows[place].split():
            return (
                f"{top}/{place} may not import {top}/{target} ({name}). If it should, add {target!r} to the line of "
                f"{place!r} in INNER_ARROWS[{top!r}] in {TABLE}; the table must stay free of circles"
            )
    return None


def inner_place(path: str, top: str) -> str | None:
    """The key of `INNER_ARROWS[top]` that `path` belongs to: the longest that fits."""
    for key in sorted(INNER_ARROWS[top], key=len, reverse=True):
        if f"{path}/".startswith(f"{top}/{key.removesuffix('.py')}/"):
            return key
    return None


def python_files() -> list[str]:
    """All Python files of the repository, each once: the room links inside tensorweave/ are not followed."""
    tops = [*ROOMS, "tensorweave/llmapi", "tensorweave/cli", "tests", "slurm", "benchmarks", ".ci", "docs"]
    files = [*(ROOT / "tensorweave").glob("*.py"), *ROOT.glob("*.py")]
    for top in tops:
        files += (ROOT / top).rglob("*.py")
    return sorted(str(path.relative_to(ROOT)) for path in files)


def test_every_import_follows_the_arrows() -> None:
    files = python_files()
    assert {place_of(path) for path in files} >= set(ARROWS) - {"kernels"}, "a room has no Python file: wrong root?"
    problems = [problem for path in files for problem in broken_rules(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not problems, "\n" + "\n".join(problems)


def test_the_inner_arrows_name_what_exists() -> None:
    gone = [f"{top}/{key}" for top, keys in INNER_ARROWS.items() for key in keys if not (ROOT / top / key).exists()]
    assert not gone, f"renamed or moved? Edit INNER_ARROWS in {TABLE}: {', '.join(gone)}"
    for top, arrows in INNER_ARROWS.items():
        unknown = {name for names in arrows.values() for name in names.split()} - set(arrows)
        assert not unknown, f"these have no line of their own in INNER_ARROWS[{top!r}]: {unknown}"
        missing = [f for f in python_files() if f.startswith(f"{top}/") and not inner_place(f.removesuffix(".py"), top)]
        assert not missing, f"add a line to INNER_ARROWS[{top!r}] in {TABLE} for {missing}"


@pytest.mark.parametrize("top", INNER_ARROWS)
def test_the_inner_arrows_have_no_circle(top: str) -> None:
    arrows = {place: names.split() for place, names in INNER_ARROWS[top].items()}
    graphlib.TopologicalSorter(arrows).prepare()  # a CycleError names the circle: take one of its arrows out


def test_no_room_is_a_regular_package() -> None:
    inits = [str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert inits == []


def test_rooms_are_linked_into_the_package() -> None:
    links = {room: (ROOT / "tensorweave" / room).readlink() for room in ROOMS}
    assert links == {room: Path("..") / room for room in ROOMS}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("cluster/gang.py", "from tensorweave.workers.step.plan import StepRow", "cluster may not import workers"),
        ("kernels/norm.py", "from tensorweave.cluster import errors", "kernels may not import cluster"),
        ("router/http/app.py", "import tensorweave.deploy.config", "router may not import deploy"),
        ("router/http/app.py", "from tensorweave import workers", "router may not import workers"),
        ("workers/engine/engine.py", "from tensorweave import LLM", "workers may not import tensorweave"),
        ("workers/models/llama.py", "from tensorweave.router import app", "workers may not import router"),
        ("deploy/service.py", "from tensorweave.llmapi.llm import LLM", "deploy may not import llmapi"),
        ("deploy/service.py", "from tensorweave.kernels.norm import rms", "deploy may not import kernels"),
        ("router/http/app.py", "def f():\n    import torch.nn", "torch in router"),
        ("tensorweave/llmapi/llm.py", "if TYPE_CHECKING:\n    from torch import Tensor", "torch in llmapi"),
        ("tensorweave/llmapi/llm.py", "import ray", "ray in llmapi"),
        ("workers/executor/executor.py", "from ray import remote", "ray in workers"),
        ("deploy/a.py", "import importlib\nimportlib.import_module('tensorweave.llmapi.llm')", "deploy may not import"),
        ("deploy/a.py", "from workers.plan import StepRow", "bare room workers.plan"),
        ("tests/test_a.py", "import cluster", "bare room cluster"),
        ("workers/engine/engine.py", "from .plan import StepRow", "relative import"),
        ("cluster/wire.py", "import pickle", "nothing is pickled"),
        ("cluster/wire.py", "from ray import cloudpickle", "nothing is pickled"),
        ("router/http/app.py", "import pickle", "nothing is pickled"),
        ("router/dispatch/loads.py", "from tensorweave.router.text import tokens", "router/dispatch may not import"),
        (
            "router/openai/requests.py",
            "from tensorweave.router.openai.prepare import Job",
            "add 'openai/prepare.py' to",
        ),
        (
            "workers/step/plan.py",
            "from tensorweave.workers.kv.manager import KVCacheManager",
            "add 'kv' to the line of",
        ),
        ("workers/new/a.py", "from tensorweave.workers.step.plan import Plan", "workers/new/a.py: add a line for it"),
        ("workers/kv/a.py", "from tensorweave.workers.new.a import Plan", "workers/new/a/Plan: add a line for it"),
        ("workers/weights.py", "import torch\nweights = torch.load('w.bin')", "torch.load unpickles"),
    ],
)
def test_a_broken_rule_is_caught(path: str, source: str, complaint: str) -> None:
    (problem,) = broken_rules(path, source)
    assert complaint in problem


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("workers/rank.py", "import ray\nimport torch\nfrom tensorweave.kernels.norm import rms"),
        ("tensorweave/__init__.py", "from tensorweave.llmapi.llm import LLM"),
        ("tensorweave/cli/main.py", "from tensorweave import LLM\nfrom tensorweave.deploy import config"),
        ("tensorweave/llmapi/llm.py", "from tensorweave.llmapi.outputs import RequestOutput"),
        ("cluster/gang.py", "import ray.util\nfrom tensorweave.cluster.errors import WorkerLost"),
        ("router/openai/prepare.py", "from tensorweave.router.openai.requests import ChatRequest"),
        (
            "workers/kv/manager.py",
            "from tensorweave.workers.kv.events import Journal\nimport tensorweave.workers.step.plan",
        ),
        ("tests/test_a.py", "import torch, ray, pickle\nfrom tensorweave.workers.step.plan import StepRow"),
    ],
)
def test_what_the_rules_allow(path: str, source: str) -> None:
    assert broken_rules(path, source) == []
