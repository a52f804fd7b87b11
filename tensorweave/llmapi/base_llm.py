"""`BaseLLM`: an `LLM` from construction to shutdown, and what can be observed of it. Generating is in `llmapi.llm`."""

from __future__ import annotations

import concurrent.futures
import threading
import uuid
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from tensorweave.llmapi.iteration_result import IterationResult
from tensorweave.llmapi.own_process import OwnProcess
from tensorweave.llmapi.runtime import LlmRuntime, start_runtime
from tensorweave.llmapi.status import set_api_status

Running: TypeAlias = set[concurrent.futures.Future[None]]


class BaseLLM:
    """A large language model, ready to generate.

    It can be used from threads and event loops, and an error of one request does not affect others. Close it with
    `shutdown` or as a context manager; an LLM that is no longer referenced closes itself. It belongs to the process
    that made it: in a forked child every method raises RuntimeError.

    Args:
        model: A Hugging Face model directory, an engine directory, a GGUF file, a hub id, or a name of `tensorweave
            models list`.
        tokenizer: Directory, hub id or tokenizer instance; default: the model's own.
        tokenizer_mode: 'auto' prefers the fast tokenizer; 'slow' goes through transformers' Python code.
        skip_tokenizer_init: Load no tokenizer; prompts are token ids and outputs have no text.
        trust_remote_code: Allow a tokenizer's own code from its repository.
        tensor_parallel_size: Ranks that share each layer; above 1 they run on Ray, which is started or joined.
        dtype: 'auto', 'float16', 'bfloat16' or 'float32'.
        revision: Branch, tag or commit of a hub model.
        tokenizer_revision: Branch, tag or commit of a hub tokenizer.
        backend: 'pytorch' (the default) is our engine; '_autodeploy' runs models that this engine has no code for;
            'tensorrt' is refused.
        kwargs: Any other field of `LlmArgs`.

    Attributes:
        tokenizer: The tokenizer instance, or None with skip_tokenizer_init.
        workspace: A directory for intermediate files, made when it is first asked for and removed by `shutdown`; None
            after that.
        disaggregated_params: How other instances fetch KV that is computed here ('backend', 'endpoints',
            'fingerprint'); empty without a `cache_transceiver_config`.
        llm_id: Identifies this instance in logs.

    Raises:
        ValueError: An argument is wrong or unknown (the nearest known name is given), or the model's files are.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: Literal["auto", "slow"] = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        backend: Literal["tensorrt", "pytorch", "_autodeploy"] | None = None,
        **kwargs: Any,
    ) -> None:
        named = {
            "model": model,
            "tokenizer": tokenizer,
            "tokenizer_mode": tokenizer_mode,
            "skip_tokenizer_init": skip_tokenizer_init,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size,
            "dtype": dtype,
            "revision": revision,
            "tokenizer_revision": tokenizer_revision,
            "backend": backend,
        }
        self._llm_id = f"llm-{uuid.uuid4().hex[:12]}"
        self._process = OwnProcess(f"LLM {self._llm_id}")
        self._runtime: LlmRuntime = start_runtime(self._llm_id, named | kwargs)
        self._running: Running = set()
        self._finalizer = weakref.finalize(self, _close_unreferenced, self._process, self._runtime, self._running)

    @property
    def tokenizer(self) -> Any:
        tokenizer = self._runtime.tokenizer
        return None if tokenizer is None else tokenizer.backend

    @property
    @set_api_status("prototype")
    def workspace(self) -> Path | None:
        self._process.check()
        return self._runtime.workspace.path if self._finalizer.alive else None

    @property
    def llm_id(self) -> str:
        return self._llm_id

    @property
    @set_api_status("prototype")
    def disaggregated_params(self) -> dict[str, Any]:
        self._process.check()
        source = self._runtime.engine.kv_source
        transceiver = self._runtime.args.cache_transceiver_config
        if source is None or transceiver is None:
            return {}
        return {
            "backend": transceiver.backend,
            "endpoints": [f"{end.host}:{end.port}" for end in source.endpoints],
            "fingerprint": dict(source.fingerprint),
        }

    @set_api_status("beta")
    def get_stats(self, timeout: float = 2.0) -> list[dict[str, Any]]:
        """Return the statistics of the engine's steps since the last call, oldest first.

        Args:
            timeout: Longest wait for the engine's answer, in seconds.

        Returns:
            One dict per step with TensorRT-LLM's keys (`iter`, `gpuMemUsage` in MB, `kvCacheStats`,
            `inflightBatchingStats`, …).
        """
        return self._usable_runtime().engine.stats(timeout)

    @set_api_status("beta")
    def get_stats_async(self, timeout: float = 2.0) -> IterationResult:
        """Return the same as `get_stats`, step by step, for an event loop.

        Args:
            timeout: Longest wait for the engine's answer, in seconds.

        Returns:
            For `async for`: one dict per step; it ends with the newest.
        """
        self._usable_runtime()
        return IterationResult(lambda: self._usable_runtime().engine.stats(timeout))

    @set_api_status("beta")
    def get_kv_cache_events(self, timeout: float = 2.0) -> list[dict[str, Any]]:
        """Return what has happened to cached KV blocks since the last call, oldest first.

        Args:
            timeout: Longest wait for the engine's answer, in seconds.

        Returns:
            Dicts with `event_id` and `data`, of type 'created', 'stored' or 'removed'. None are kept unless
            `kv_cache_config.event_buffer_max_size` is set.
        """
        return self._usable_runtime().engine.kv_events(timeout)

    @set_api_status("beta")
    def get_kv_cache_events_async(self, timeout: float = 2.0) -> IterationResult:
        """Return the same as `get_kv_cache_events`, one by one, for an event loop.

        Args:
            timeout: Longest wait for the engine's answer, in seconds.

        Returns:
            For `async for`: one dict per event; it ends with the newest.
        """
        self._usable_runtime()
        return IterationResult(lambda: self._usable_runtime().engine.kv_events(timeout))

    @set_api_status("beta")
    def shutdown(self) -> None:
        """End running requests, free the model and stop what this object started. A second call does nothing."""
        self._process.check()
        if self._finalizer.detach() is not None:
            _close(self._runtime, self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_this:  # a forked child that ends inside the block leaves its parent's LLM alone
            self.shutdown()

    def __getstate__(self) -> object:
        raise RuntimeError("an LLM object cannot be pickled; create it where it runs")

    def _usable_runtime(self) -> LlmRuntime:
        self._process.check()
        if not self._finalizer.alive:
            raise RuntimeError("this LLM has been shut down")
        return self._runtime


def _close_unreferenced(process: OwnProcess, runtime: LlmRuntime, running: Running) -> None:
    """The garbage collector may run on any thread, including those that `_close` waits for, so closing gets a thread of
    its own. The main thread is none of those, and when the interpreter exits no other thread can be started."""
    if not process.is_this:
        return
    if threading.current_thread() is threading.main_thread():
        _close(runtime, running)
    else:
        threading.Thread(target=_close, args=(runtime, running), name="llm-closer").start()


def _close(runtime: LlmRuntime, running: Running) -> None:
    for future in tuple(running):
        future.cancel()
    runtime.close()
