"""The process that tries guides for a rank (`trials.py`, which starts it and is trusted).

Its input has a `start` frame, then one `try` frame per guide; its output a `vocabulary` frame, or `failed`, then one
`tried` frame per guide, in any order. It ends when its input ends. Each guide is tried in a child, which the kernel
ends at its limits of time; a second child waits for that one and reports how it ended.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from tensorweave.cluster.guide import Guide
from tensorweave.cluster.priority import lower_priority
from tensorweave.cluster.wire import READ_BYTES, Frame, FrameDecoder, pack_frame
from tensorweave.cluster.without_torch import hide_torch_from_transformers
from tensorweave.workers.guided.compilers import Compilers
from tensorweave.workers.guided.limits import TRIAL_CPU_S, TRIAL_MEMORY_BYTES, TRIAL_WALL_S
from tensorweave.workers.guided.trial import TrialResult, try_guide
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary, read_vocabulary

_STACK_BYTES: Final = 4 << 20
"""Half of what a rank has for the same: a guide that is too deep for it fails here."""
_MAX_PROBLEM: Final = 1000


def main() -> None:
    source, sink = open(0, "rb", closefd=False), _take_stdout()  # noqa: SIM115 (open until the process ends)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    frames = _frames(source)
    _, fields, vocab_size = next(frames)
    tokenizer = TokenizerSource.from_wire(fields)
    if not tokenizer.trust_remote_code:  # a model's own code may want all of transformers
        import xgrammar  # noqa: F401  first: it takes a class from transformers that needs torch

        hide_torch_from_transformers()
    try:
        vocabulary = read_vocabulary(tokenizer, vocab_size)
    except Exception as error:  # the request's boundary: whatever a tokenizer's code raises
        _write(sink, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_PROBLEM]}")
        return
    compilers = Compilers(vocabulary)
    compilers.open("xgrammar")  # once, and not in each child
    _write(sink, "vocabulary", vocabulary.to_wire())
    lower_priority()  # not before: beside step loops on all cores, all this would take a minute, once
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that report
    for _, number, guide_fields in frames:
        if os.fork() == 0:
            _report(sink, number, Guide.from_wire(guide_fields), compilers, vocabulary)


def _frames(source: BufferedReader) -> Iterator[Frame]:
    decoder = FrameDecoder()
    while data := source.read1(READ_BYTES):
        yield from decoder.feed(data)


def _take_stdout() -> BinaryIO:
    """Return a copy of standard output, for frames, and redirect what libraries print to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sink


def _write(sink: BinaryIO, name: str, *fields: object) -> None:
    sink.write(pack_frame(name, *fields))
    sink.flush()


def _report(sink: BinaryIO, number: int, guide: Guide, compilers: Compilers, vocabulary: Vocabulary) -> NoReturn:
    """In a child: try the guide in another one, and report how that ends. One write, which others do not split."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _try_within_limits(writer, guide, compilers, vocabulary)
    os.close(writer)
    with open(reader, "rb") as answers:
        answer = next(_frames(answers), None)
    _, status = os.waitpid(child, 0)
    result = _cut_off(status) if answer is None else TrialResult.from_wire(answer[1])
    os.write(sink.fileno(), pack_frame("tried", number, result.to_wire()))
    os._exit(0)


def _try_within_limits(writer: int, guide: Guide, compilers: Compilers, vocabulary: Vocabulary) -> NoReturn:
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

    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
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
