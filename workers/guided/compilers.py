"""`Compilers`: from a `Guide` to a compiled grammar, by the library that the guide names. Used in the process of the
trials and on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tensorweave.cluster.guide import Guide, GuideBackend
from tensorweave.workers.guided.compile_run import Run, run_here
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary
from tensorweave.workers.step.grammar import Grammar

if TYPE_CHECKING:
    from tensorweave.workers.guided.llguidance_backend import ReadyTokenizer


class SizedGrammar(Grammar, Protocol):
    on_slow: Callable[[], None] | None

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""


class Compiler(Protocol):
    def compile(self, guide: Guide, run: Run) -> SizedGrammar:
        """`run` gets what takes long and does not need the interpreter. Raises ValueError with what is wrong with the
        guide."""


def make_ready(source: TokenizerSource, vocab_size: int) -> ReadyTokenizer | None:
    """Do before the first guide comes what keeps the interpreter's lock for long: import both libraries (0.6 s), and
    read the tokenizer for llguidance."""
    import tensorweave.workers.guided.xgrammar_backend  # noqa: F401
    from tensorweave.workers.guided.llguidance_backend import ReadyTokenizer

    return ReadyTokenizer.read(source, vocab_size)


class Compilers:
    """A library reads the vocabulary when its first guide comes. For one thread.

    `ready`: what was made before.
    """

    def __init__(self, vocabulary: Vocabulary, ready: ReadyTokenizer | None = None) -> None:
        self._vocabulary = vocabulary
        self._ready = ready
        self._by_backend: dict[GuideBackend, Compiler] = {}

    def compile(self, guide: Guide, run: Run = run_here) -> SizedGrammar:
        """Raises ValueError with what is wrong with the guide."""
        return self.open(guide.backend).compile(guide, run)

    def open(self, backend: GuideBackend) -> Compiler:
        compiler = self._by_backend.get(backend)
        if compiler is None:
            compiler = self._by_backend[backend] = self._make(backend)
        return compiler

    def _make(self, backend: GuideBackend) -> Compiler:
        if backend == "llguidance":
            from tensorweave.workers.guided.llguidance_backend import LlguidanceCompiler

            return LlguidanceCompiler(self._vocabulary, self._ready)
        from tensorweave.workers.guided.xgrammar_backend import XgrammarCompiler

        return XgrammarCompiler(self._vocabulary)
