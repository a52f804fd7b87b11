"""Every path, module and link that the documents name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.parsed import parsed

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TOPS = "cluster|workers|router|kernels|deploy|tensorweave|llmapi|tests|docs|slurm|benchmarks|\\.ci"
PATH = re.compile(rf"(?<![\w./~-])(?:{TOPS})/[\w./*-]*")
MODULE = re.compile(r"\btensorweave(?:\.\w+)+")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def missing_in(text: str, folder: Path = ROOT) -> list[str]:
    paths = {path.rstrip(".") for path in PATH.findall(text)}
    modules = set(MODULE.findall(text)) if "tensorweave." in text else set()
    links = {link for link in LINK.findall(text) if not (folder / link).exists()}
    return sorted(
        {path for path in paths if not _exists(path)} | {name for name in modules if not _is_name(name)} | links
    )


def _exists(path: str) -> bool:
    """As it stands, or below tensorweave/ (`llmapi/llm.py`); `*` stands for any name."""
    return any(any(base.glob(path.rstrip("/"))) for base in (ROOT, ROOT / "tensorweave"))


def _is_name(dotted: str) -> bool:
    """A module or a folder, or a name that the module defines."""
    place = ROOT / dotted.replace(".", "/")
    if place.is_dir() or place.with_suffix(".py").is_file():
        return True
    module = place.parent / "__init__.py" if place.parent.is_dir() else place.parent.with_suffix(".py")
    if not module.is_file():
        return False
    bodies = parsed(module.read_text(encoding="utf-8")).body
    defined = {node.name for node in bodies if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    return place.name in defined or re.search(rf"^{place.name}\b", module.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    missing = missing_in(page.read_text(encoding="utf-8"), page.parent)
    assert not missing, f"{page.relative_to(ROOT)} names what is not there: {', '.join(missing)}"


def test_what_is_missing_is_found() -> None:
    assert missing_in("See `workers/executor/executor.py`, tests/*/ and [this](docs/models.md#memory).") == []
    assert missing_in("`workers/gone.py`, [that](docs/gone.md)") == ["docs/gone.md", "workers/gone.py"]
    assert missing_in("tensorweave.workers.rank.RankWorker, tensorweave.cluster.wire") == []
    assert missing_in("tensorweave.workers.rank.Gone and tensorweave.gone.wire") == [
        "tensorweave.gone.wire",
        "tensorweave.workers.rank.Gone",
    ]
