"""`Communicator`: two ranks over NCCL, created outside torch.distributed, whose watchdog ends the process when a peer
dies.

The library that torch has loaded is called directly: its communicators can be created without blocking, aborted by the
thread that waits for them, and created again. A communicator that failed is aborted and unusable. All calls on one
thread.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import TransferFailed

ID_BYTES: Final = 128
_SUCCESS: Final = 0
_IN_PROGRESS: Final = 7
_INT8: Final = 0
_MAGIC: Final = 0xCAFEBEEF
_CONFIG_VERSION: Final = 21400
"""The layout of `ncclConfig_t` that `_Config` follows, of NCCL 2.14; a newer library fills in the other fields."""
_PAUSE_S: Final = 20e-6

IsBroken = Callable[[], bool]


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    ]


@functools.cache
def load_library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnccl.so.2")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclGetErrorString.argtypes = [ctypes.c_int]
    library.ncclGetUniqueId.argtypes = [ctypes.POINTER(_UniqueId)]
    library.ncclCommInitRankConfig.argtypes = [
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int, ctypes.POINTER(_Config),
    ]  # fmt: skip
    library.ncclCommGetAsyncError.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    library.ncclCommAbort.argtypes = [ctypes.c_void_p]
    for transfer in (library.ncclSend, library.ncclRecv):
        transfer.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
    return library


def new_unique_id() -> bytes:
    """The id of a new communicator; the process that creates it must live until both ranks have joined."""
    unique_id = _UniqueId()
    _check(load_library().ncclGetUniqueId(ctypes.byref(unique_id)))
    return bytes(memoryview(unique_id))


class Communicator:
    """This rank, 0 or 1, on the current device. Every wait ends after `timeout_s`, or once `is_broken` says so."""

    def __init__(self, unique_id: bytes, rank: int, timeout_s: float, is_broken: IsBroken) -> None:
        if len(unique_id) != ID_BYTES:
            raise TransferFailed("NCCL: malformed id")
        self._peer = 1 - rank
        self._is_broken = is_broken
        self._handle = ctypes.c_void_p()
        config = _Config(ctypes.sizeof(_Config), _MAGIC, _CONFIG_VERSION, 0)
        result = load_library().ncclCommInitRankConfig(
            ctypes.byref(self._handle), 2, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        self._settle(result, timeout_s)

    def send(self, data: Tensor, timeout_s: float) -> None:
        """Send on the current stream; the data must not change until that work has completed."""
        self._transfer(load_library().ncclSend, data, timeout_s)

    def receive(self, data: Tensor, timeout_s: float) -> None:
        self._transfer(load_library().ncclRecv, data, timeout_s)

    def wait(self, event: torch.cuda.Event, timeout_s: float) -> None:
        """Wait until the work that was queued before the event is done."""
        self._await(event.query, timeout_s)

    def abort(self) -> None:
        """End the communicator, including its work on the GPU."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle.value is not None:
            load_library().ncclCommAbort(handle)

    def _transfer(self, function: Any, data: Tensor, timeout_s: float) -> None:
        stream = torch.cuda.current_stream(data.device).cuda_stream
        self._settle(function(data.data_ptr(), data.nbytes, _INT8, self._peer, self._handle, stream), timeout_s)

    def _settle(self, result: int, timeout_s: float) -> None:
        """Wait for NCCL's own thread to finish the host part of a call that returned `result`."""
        state = ctypes.c_int(_IN_PROGRESS)

        def is_settled() -> bool:
            _check(load_library().ncclCommGetAsyncError(self._handle, ctypes.byref(state)))
            return state.value != _IN_PROGRESS

        try:
            if result != _IN_PROGRESS:
                _check(result)
            self._await(is_settled, timeout_s)
            _check(state.value)
        except TransferFailed:
            self.abort()
            raise

    def _await(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        """Neither NCCL nor CUDA has a wait with a deadline, so this polls."""
        end_s = time.monotonic() + timeout_s
        while not is_done():
            if self._is_broken():
                self.abort()
                raise TransferFailed("NCCL: the peer was lost")
            if time.monotonic() >= end_s:
                self.abort()
                raise TransferFailed(f"NCCL: nothing moved for {timeout_s:g} s")
            time.sleep(_PAUSE_S)


def _check(result: int) -> None:
    if result != _SUCCESS:
        raise TransferFailed(f"NCCL: {load_library().ncclGetErrorString(result).decode()}")
