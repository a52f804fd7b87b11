"""`PeftFiles`: the files of a PEFT directory, read once: what is digested is what is used.

A digest that was computed for a directory is remembered with the files' times and sizes, so that whoever names the
directory with each request (`LoRARequest`) does not have it read each time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tensorweave.cluster.adapter import DIGEST_BYTES, Adapter
from tensorweave.workers.lora.peft_config import PeftConfig

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = "adapter_model.bin"
_PREFIX: Final = "base_model.model."
_MOST_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class PeftFiles:
    config: bytes
    weights: bytes

    @classmethod
    def read(cls, path: Path) -> PeftFiles:
        """Raises ValueError if they cannot be read."""
        try:
            return cls((path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes())
        except OSError as error:
            if (path / _PICKLED).is_file():
                raise ValueError(f"{path} has {_PICKLED}, which is never read: save it as {WEIGHTS}") from None
            raise ValueError(f"no PEFT adapter can be read from {path}: {error.strerror or error}") from None

    @property
    def digest(self) -> bytes:
        """The digest of both, the same in every process."""
        state = hashlib.blake2b(len(self.config).to_bytes(8, "little"), digest_size=DIGEST_BYTES)
        state.update(self.config)
        state.update(self.weights)
        return state.digest()

    def parse(self) -> tuple[PeftConfig, Mapping[str, Mapping[str, Tensor]]]:
        """The configuration, and A and B ('A', 'B') of each linear layer by its name in the base model. Raises
        ValueError."""
        config = PeftConfig.parse(self.config)
        try:
            tensors = safetensors.torch.load(self.weights)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{WEIGHTS} cannot be read: {error}") from None
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, kind = _split(name)
            modules.setdefault(module, {})[kind] = tensor
        return config, modules


def _split(name: str) -> tuple[str, str]:
    for kind in "AB":
        if name.startswith(_PREFIX) and name.endswith(f".lora_{kind}.weight"):
            return name.removeprefix(_PREFIX).removesuffix(f".lora_{kind}.weight"), kind
    raise ValueError(f"{WEIGHTS} has {name}, which is neither A nor B of a linear layer: it is not computed here")


Stamp = tuple[tuple[int, int, int], ...]


class DigestCache:
    """For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: OrderedDict[str, tuple[Stamp, bytes]] = OrderedDict()

    def find(self, name: str, path: str) -> Adapter:
        """The adapter that the directory holds now. Raises ValueError if there is none; it is read if it has changed
        since the last call."""
        stamp = _stamp(Path(path))
        with self._lock:
            known = self._digests.get(path)
        if known is None or known[0] != stamp:
            files = PeftFiles.read(Path(path))
            PeftConfig.parse(files.config)
            known = stamp, files.digest
            with self._lock:
                self._digests[path] = known
                self._digests.move_to_end(path)
                if len(self._digests) > _MOST_REMEMBERED:
                    self._digests.popitem(last=False)
        return Adapter(name, known[1], path)


def _stamp(path: Path) -> Stamp:
    try:
        stats = [(path / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError:
        PeftFiles.read(path)  # says what is wrong
        stats = [(path / name).stat() for name in (CONFIG, WEIGHTS)]
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
