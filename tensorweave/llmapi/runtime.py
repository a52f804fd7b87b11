"""`LlmRuntime`: what an `LLM` runs on: arguments, tokenizer, engine, event loop, dispatcher.

It is separate from the `LLM` object, so that it can be closed after the garbage collector has taken that one.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.llmapi.engine import Engine, open_engine
from tensorweave.llmapi.loop_thread import LoopThread
from tensorweave.llmapi.request_maker import RequestMaker
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.build import check_model
from tensorweave.workers.store.model_store import resolve_model


class Workspace:
    """A temporary directory that is made when it is first asked for. It stays until `remove`: a `TemporaryDirectory`
    would be removed when a forked child ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._directory: Path | None = None

    @property
    def path(self) -> Path:
        with self._lock:
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix=f"tensorweave-{self._name}-"))
            return self._directory

    def remove(self) -> None:
        with self._lock:
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None


@dataclass(frozen=True, slots=True)
class LlmRuntime:
    args: TorchLlmArgs
    model_dir: Path
    tokenizer: Tokenizer | None
    loop: LoopThread
    engine: Engine
    dispatcher: Dispatcher
    maker: RequestMaker
    workspace: Workspace = field(repr=False)

    def close(self) -> None:
        try:
            self.engine.close()
        finally:
            self.loop.close()
            self.workspace.remove()


def start_runtime(llm_id: str, values: Mapping[str, Any]) -> LlmRuntime:
    """Start everything that `values` (fields of `TorchLlmArgs`) ask for.

    Raises:
        ValueError: an argument, or a file of the model, is wrong.
        NotReady: the engine did not come up.
    """
    args = _parse(values)
    model_dir = resolve_model(args.model, revision=args.revision)
    choose_format(None, tool_parser=args.tool_parser, reasoning_parser=args.reasoning_parser)  # refuses unknown names
    check_model(args)  # a wrong model is refused before anything is loaded
    tokenizer = None if args.skip_tokenizer_init else _load_tokenizer(args, model_dir)
    with ExitStack() as undo:
        loop = LoopThread(f"{llm_id}-loop")
        undo.callback(loop.close)
        engine = open_engine(args, loop)
        undo.callback(engine.close)
        dispatcher = loop.call(_make_dispatcher(engine, args.max_queued_requests))
        maker = RequestMaker(llm_id, args, tokenizer, engine)
        undo.pop_all()
    return LlmRuntime(args, model_dir, tokenizer, loop, engine, dispatcher, maker, Workspace(llm_id))


def _parse(values: Mapping[str, Any]) -> TorchLlmArgs:
    try:
        return TorchLlmArgs(**values)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_sentence(item) for item in error.errors())) from None


def _sentence(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (given: {item['input']!r})" if name else message


def _load_tokenizer(args: TorchLlmArgs, model_dir: Path) -> Tokenizer:
    source = model_dir if args.tokenizer is None else args.tokenizer
    try:
        return Tokenizer.load(
            source,
            tokenizer_mode=args.tokenizer_mode,
            revision=args.tokenizer_revision,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokenizer can be loaded from {source} ({reason}); see skip_tokenizer_init") from error


async def _make_dispatcher(engine: Engine, max_inflight: int) -> Dispatcher:
    """Requests wait here, without a limit, until the engine has room for them; only callers set deadlines."""
    limits = Limits(
        max_inflight=max_inflight,
        max_queued=1 << 30,
        max_queued_tokens=1 << 62,
        queue_timeout_s=math.inf,
        default_deadline_s=None,
        ready_timeout_s=60.0,
        waits_for_room=True,
    )
    return Dispatcher(engine.fleet, limits=limits)
