"""No module imports itself through others, not even under TYPE_CHECKING or inside a function."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Mapping

from tests.parsed import parsed
from tests.test_arrows import CIRCLES, ROOT, imported_modules, place_of, python_files


def circle_of(sources: Mapping[str, str]) -> list[str]:
    """The modules of one circle of imports, each importing the next one; empty where there is none."""
    modules = {module_of(path): path for path in sources}
    imports: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [name for _, name in imported_modules(parsed(sources[path], path)) if (path, name) not in CIRCLES]
        imports[module] = set(_known_modules(names, modules)) - {module}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def module_of(path: str) -> str:
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.startswith("tensorweave") else f"tensorweave.{dotted}"


def _known_modules(names: Iterable[str], modules: Mapping[str, str]) -> Iterator[str]:
    """For each imported name, the module that it is or lies in."""
    for name in names:
        parent = name.rpartition(".")[0]
        if name in modules or parent in modules:
            yield name if name in modules else parent


def test_no_module_imports_itself_through_others() -> None:
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files() if place_of(path) is not None}
    circle = circle_of(sources)
    assert not circle, f"move what two of them need into a third: {' → '.join(circle)}"


def test_a_circle_is_caught() -> None:
    sources = {
        "workers/a.py": "from tensorweave.workers import b",
        "workers/b.py": "if TYPE_CHECKING:\n    from tensorweave.cluster.c import Name",
        "cluster/c.py": "def late() -> None:\n    import tensorweave.workers.a",
        "cluster/d.py": "from tensorweave.workers.a import Name",
    }
    assert set(circle_of(sources)) == {"tensorweave.workers.a", "tensorweave.workers.b", "tensorweave.cluster.c"}
    assert circle_of({path: source for path, source in sources.items() if path != "cluster/c.py"}) == []
