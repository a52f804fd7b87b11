"""The process that tries guides for a rank (`trials.py`, which starts it and is trusted).

Its input has a `start` frame, then one `try` frame per guide; its output a `vocabulary` frame, or `failed`, then one
`tried` frame per guide, in any order. It ends when its input ends. Each guide is tried in a child, which the kernel
ends at its limits of time. A child begins at the usual priority, if that was not asked for too often lately, and has a
low one after 40 ms of processor time, which most guides end within.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from tensorweave.cluster.guide import Guide
from tensorweave.cluster.priority import lower_all_threads
from tensorweave.cluster.wire import READ_BYTES, Frame, FrameDecoder, pack_frame
from tensorweave.cluster.without_torch import hide_torch_from_transformers
from tensorweave.workers.guided.allowance import Allowance
from tensorweave.workers.guided.compilers import Compilers
from tensorweave.workers.guided.limits import (
    TRIAL_CPU_S,
    TRIAL_MEMORY_BYTES,
    TRIAL_WALL_S,
    USUAL_CPU_S,
    USUAL_MOST_S,
    USUAL_SHARE,
)
from tensorweave.workers.guided.trial import TrialResult, try_guide
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary, read_vocabulary

_STACK_BYTES: Final = 4 << 20
"""Half of what a rank has for the same: a guide that is too deep for it fails here."""
_MAX_PROBLEM: Final = 1000
_STDIN: Final = 0


def main() -> None:
    sink = _take_stdout()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    frames = _Frames(_STDIN)
    _, fields, vocab_size = frames.next()
    tokenizer = TokenizerSource.from_wire(fields)
    if not tokenizer.trust_remote_code:  # a model's own code may want all of transformers
        import xgrammar  # noqa: F401  first: it takes a class from transformers that needs torch

        hide_torch_from_transformers()
    try:
        vocabulary = read_vocabulary(tokenizer, vocab_size)
    except Exception as error:  # the request's boundary: whatever a tokenizer's code raises
        _write(sink, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_PROBLEM]}")
        return
    _write(sink, "vocabulary", vocabulary.to_wire())
    compilers = Compilers(vocabulary)
    _open_all(compilers)
    _Children(frames, sink, compilers, vocabulary).run()


def _open_all(compilers: Compilers) -> None:
    """Once, and not in each child: llguidance's form of the tokenizer alone takes 0.3 s."""
    compilers.open("xgrammar")
    with contextlib.suppress(ValueError):  # it does not read this tokenizer, which each of its guides is told
        compilers.open("llguidance")
    gc.collect()
    gc.freeze()  # so that children do not copy the pages of what they share


class _Frames:
    """Of a pipe. `waiting` are those that were read together with the one before them."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.waiting: collections.deque[Frame] = collections.deque()
        self._decoder = FrameDecoder()

    def read(self) -> bool:
        """Wait for data. Whether there was any."""
        data = os.read(self.pipe, READ_BYTES)
        self.waiting.extend(self._decoder.feed(data))
        return bool(data)

    def next(self) -> Frame:
        while not self.waiting and self.read():
            pass
        return self.waiting.popleft()


def _take_stdout() -> BinaryIO:
    """Return a copy of standard output, for frames, and redirect what libraries print to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sink


def _write(sink: BinaryIO, name: str, *fields: object) -> None:
    sink.write(pack_frame(name, *fields))
    sink.flush()


@dataclass(slots=True)
class _Child:
    """A child that tries a guide, with the guide's number."""

    process: int
    number: int
    frames: _Frames
    has_answered: bool = False


class _Children:
    """Forks a child for each guide, until the input ends, and reports how each has ended."""

    def __init__(self, frames: _Frames, sink: BinaryIO, compilers: Compilers, vocabulary: Vocabulary) -> None:
        self._frames = frames
        self._sink = sink
        self._compilers = compilers
        self._vocabulary = vocabulary
        self._allowance = Allowance(USUAL_SHARE, USUAL_MOST_S)
        self._running: dict[int, _Child] = {}
        """By the pipe that they answer on."""
        self._poll = select.poll()
        self._poll.register(frames.pipe, select.POLLIN)

    def run(self) -> None:
        is_open = True
        while is_open:
            while self._frames.waiting:
                _, number, guide = self._frames.waiting.popleft()
                self._fork(number, Guide.from_wire(guide))
            for pipe, _ in self._poll.poll():
                if pipe == self._frames.pipe:
                    is_open = self._frames.read()
                else:
                    self._hear(self._running[pipe])

    def _fork(self, number: int, guide: Guide) -> None:
        reader, writer = os.pipe()
        usual_s = USUAL_CPU_S if self._allowance.take(USUAL_CPU_S) else 0.0
        process = os.fork()
        if process == 0:
            os.close(reader)
            _try_within_limits(writer, guide, self._compilers, self._vocabulary, usual_s)
        os.close(writer)
        self._running[reader] = _Child(process, number, _Frames(reader))
        self._poll.register(reader, select.POLLIN)

    def _hear(self, child: _Child) -> None:
        """Its answer, or that it has ended."""
        is_open = child.frames.read()
        if child.frames.waiting:
            _, result = child.frames.waiting.popleft()
            self._report(child, TrialResult.from_wire(result))
        if is_open:
            return
        self._poll.unregister(child.frames.pipe)
        os.close(child.frames.pipe)
        del self._running[child.frames.pipe]
        _, status = os.waitpid(child.process, 0)
        if not child.has_answered:
            self._report(child, _cut_off(status))

    def _report(self, child: _Child, result: TrialResult) -> None:
        child.has_answered = True
        _write(self._sink, "tried", child.number, result.to_wire())


def _run_on_thread(work: Callable[[], None], usual_s: float) -> None:
    """Run it at the usual priority for so much processor time of this process, and then at a low one."""
    if usual_s:
        signal.signal(signal.SIGPROF, lambda *_: lower_all_threads())
        signal.setitimer(signal.ITIMER_PROF, usual_s)
    else:
        lower_all_threads()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})  # in the new thread
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})  # here: Python runs handlers in this thread alone
    thread.join()


def _try_within_limits(
    writer: int, guide: Guide, compilers: Compilers, vocabulary: Vocabulary, usual_s: float
) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, TRIAL_WALL_S)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + TRIAL_CPU_S, -1))
    held = _data_bytes() + TRIAL_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (held, held))

    def run() -> None:
        try:
            result = try_guide(compilers, guide, vocabulary.size, vocabulary.end_id)
        except MemoryError:
            return
        except Exception as error:  # the request's boundary: whatever a library raises
            result = TrialResult(f"{type(error).__name__}: {error}")
        problem = result.problem[:_MAX_PROBLEM]
        os.write(writer, pack_frame("tried", TrialResult(problem, result.num_bytes).to_wire()))

    _run_on_thread(run, usual_s)
    os._exit(0)


def _data_bytes() -> int:
    """Memory of this process that counts for RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


def _cut_off(status: int) -> TrialResult:
    """Of a trial that ended without a result, with this status."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return TrialResult(f"it takes more than {TRIAL_CPU_S} s of processor time to compile")
    if number == signal.SIGALRM:
        return TrialResult(f"it was not compiled within {TRIAL_WALL_S:g} s", is_late=True)
    if number in (signal.SIGSEGV, signal.SIGBUS):
        return TrialResult("it is nested too deep")
    return TrialResult(f"it takes more than {TRIAL_MEMORY_BYTES >> 20} MB of memory to compile")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # the rank has ended
    sys.exit(0)
