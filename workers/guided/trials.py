"""`Trials`: a rank's side of the process that reads the tokenizer and tries guides (`trial_process.py`).

The process is started when it is first needed, and again if it has died.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Final, TypeVar

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.cluster.guide import GUIDE_PARAM, Guide
from tensorweave.cluster.wire import READ_BYTES, FrameDecoder, pack_frame
from tensorweave.workers.guided.limits import START_TIMEOUT_S, TRIAL_WALL_S
from tensorweave.workers.guided.trial import TrialResult
from tensorweave.workers.guided.vocabulary import TokenizerSource, Vocabulary

_T = TypeVar("_T")

_SLACK_S: Final = 10.0
_EXIT_TIMEOUT_S: Final = 5.0


class Trials:
    """For any thread."""

    def __init__(self, source: TokenizerSource, vocab_size: int) -> None:
        self.source = source
        self.vocab_size = vocab_size
        self._lock = threading.Lock()
        self._process: _TrialProcess | None = None
        self._is_closed = False

    def vocabulary(self) -> Vocabulary:
        """Raises RequestRejected if the tokenizer cannot be loaded, NotReady if the process does not answer or this is
        closed."""
        return self._running().vocabulary()

    def run(self, guide: Guide) -> TrialResult:
        """Try a guide; returns within its limits of time. Raises as `vocabulary`."""
        return self._running().run(guide)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def _running(self) -> _TrialProcess:
        with self._lock:
            if self._is_closed:
                raise _gone()
            if self._process is None or not self._process.is_alive:
                self._process = _TrialProcess(self.source, self.vocab_size)
            return self._process


class _TrialProcess:
    def __init__(self, source: TokenizerSource, vocab_size: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tensorweave.workers.guided.trial_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # Ctrl-C goes to this process; that one ends with its input, and needs this session
        )
        self._lock = threading.Lock()
        self._vocabulary: Future[Vocabulary] = Future()
        self._tried: dict[int, Future[TrialResult]] = {}
        self._num_tried = 0
        self._has_ended = False
        self._send("start", source.to_wire(), vocab_size)
        threading.Thread(target=self._read, name="guide-trials", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return not self._has_ended and self._process.poll() is None

    def vocabulary(self) -> Vocabulary:
        return _result(self._vocabulary, START_TIMEOUT_S, "the process that reads the tokenizer for grammars")

    def run(self, guide: Guide) -> TrialResult:
        self.vocabulary()
        tried: Future[TrialResult] = Future()
        with self._lock:
            if self._has_ended:
                raise _gone()
            self._num_tried += 1
            number = self._num_tried
            self._tried[number] = tried
            self._send("try", number, guide.to_wire())
        try:
            return _result(tried, TRIAL_WALL_S + _SLACK_S, "the process that tries grammars")
        finally:
            with self._lock:
                self._tried.pop(number, None)

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait(_EXIT_TIMEOUT_S)

    def _send(self, name: str, *fields: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; reading shows that too
            self._process.stdin.write(pack_frame(name, *fields))
            self._process.stdin.flush()

    def _read(self) -> None:
        """On a thread, until the process ends."""
        assert self._process.stdout is not None
        decoder = FrameDecoder()
        try:
            while data := self._process.stdout.read1(READ_BYTES):  # type: ignore[attr-defined]
                for name, *fields in decoder.feed(data):
                    self._take(name, fields)
        finally:
            self._end()

    def _take(self, name: str, fields: list[Any]) -> None:
        match name, fields:
            case "vocabulary", [vocabulary]:
                self._vocabulary.set_result(Vocabulary.from_wire(vocabulary))
            case "failed", [message]:
                refusal = f"grammars need the model's tokenizer, which cannot be loaded here: {message}"
                self._vocabulary.set_exception(RequestRejected(refusal, param=GUIDE_PARAM))
            case "tried", [number, result]:
                with self._lock:
                    tried = self._tried.pop(number, None)
                if tried is not None:
                    tried.set_result(TrialResult.from_wire(result))

    def _end(self) -> None:
        with self._lock:
            self._has_ended = True
            tried, self._tried = self._tried, {}
        if not self._vocabulary.done():
            self._vocabulary.set_exception(_gone())
        for each in tried.values():
            each.set_exception(_gone())
        self._process.wait()


def _gone() -> NotReady:
    return NotReady("the process that compiles grammars has ended", retry_after_s=1.0)


def _result(future: Future[_T], timeout_s: float, who: str) -> _T:
    try:
        return future.result(timeout_s)
    except FutureTimeoutError:
        raise NotReady(f"{who} has not answered within {timeout_s:g} s", retry_after_s=1.0) from None
