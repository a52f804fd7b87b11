"""Where compiled kernels are kept on disk: Triton's cache directory, which CUDA C++ kernels share."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

logger = logging.getLogger(__name__)


def ensure_kernel_cache() -> Path:
    """Triton's cache directory; one of this user's own among the temporary files if that cannot be written."""
    import triton

    wanted = Path(triton.knobs.cache.dir)
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted).close()
    except OSError as error:
        directory = _private_directory()
        logger.warning(
            "compiled kernels cannot be kept in %s (%s) but in %s; set TRITON_CACHE_DIR to a directory that lasts",
            wanted,
            error.strerror,
            directory,
        )
        triton.knobs.cache.dir = str(directory)
        return directory
    return wanted


def _private_directory() -> Path:
    """What lies there is executed on the GPU, so that nobody else may write there."""
    directory = Path(tempfile.gettempdir()) / f"tensorweave-kernels-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="tensorweave-kernels-"))
    return directory


def cached_binary(directory: Path, source: bytes, compiler: str, make: Callable[[], bytes]) -> bytes:
    """What `make` compiles of `source`, or what an earlier call of any process did; `compiler` is all else that it
    depends on."""
    file = directory / f"tensorweave-{sha256(compiler.encode() + source).hexdigest()}.cubin"
    try:
        return file.read_bytes()
    except FileNotFoundError:
        binary = make()
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as made:
        made.write(binary)
    os.replace(made.name, file)
    return binary
