"""`Compilers`: from a `Guide` to a compiled grammar, by the library that the guide names. Used in the process of the
trials and on every rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

from tensorweave.cluster.guide import Guide, GuideBackend
from tensorweave.workers.guided.vocabulary import Vocabulary
from tensorweave.workers.step.grammar import Grammar


class SizedGrammar(Grammar, Protocol):
    on_slow: Callable[[], None] | None

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""


class Compiler(Protocol):
    def compile(self, guide: Guide) -> SizedGrammar:
        """Raises ValueError with what is wrong with the guide."""


def import_libraries() -> None:
    """Import both libraries, which takes 0.7 s and keeps the interpreter's lock for up to 0.2 s."""
    for name in ("xgrammar", "llguidance"):
        importlib.import_module(f"tensorweave.workers.guided.{name}_backend")


class Compilers:
    """A library reads the vocabulary when its first guide comes. For one thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._by_backend: dict[GuideBackend, Compiler] = {}

    def compile(self, guide: Guide) -> SizedGrammar:
        """Raises ValueError with what is wrong with the guide."""
        return self.open(guide.backend).compile(guide)

    def open(self, backend: GuideBackend) -> Compiler:
        compiler = self._by_backend.get(backend)
        if compiler is None:
            compiler = self._by_backend[backend] = self._make(backend)
        return compiler

    def _make(self, backend: GuideBackend) -> Compiler:
        if backend == "llguidance":
            from tensorweave.workers.guided.llguidance_backend import LlguidanceCompiler

            return LlguidanceCompiler(self._vocabulary)
        from tensorweave.workers.guided.xgrammar_backend import XgrammarCompiler

        return XgrammarCompiler(self._vocabulary)
