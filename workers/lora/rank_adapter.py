"""One rank's share of an adapter: from PEFT's matrices to the parts that this rank's products get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensorweave.cluster.adapter import Adapter
from tensorweave.kernels.lora.reference import PacksAdapters, UpdatePart
from tensorweave.workers.lora.peft_config import PeftConfig
from tensorweave.workers.lora.peft_directory import WEIGHTS, PeftFiles
from tensorweave.workers.models.adapter_sites import Site, SitePart
from tensorweave.workers.step.adapter import RankAdapter

# R rank, K inputs, N outputs


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """`max_rank` of an adapter; `modules` are the linear layers that adapters may change, by the ends of their names;
    none: all."""

    max_rank: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """Makes a rank's share of adapters, for a model with these `sites`, and those in other pipeline stages, of whose
    tensors the names and shapes are checked."""

    sites: Sequence[Site]
    kernels: PacksAdapters
    dtype: torch.dtype
    device: torch.device
    limits: AdapterLimits
    sites_elsewhere: Sequence[Site] = ()

    def read(self, adapter: Adapter) -> RankAdapter:
        """Raises ValueError if its files are wrong, or are no longer those of the digest."""
        files = PeftFiles.read(Path(adapter.path))
        if files.digest != adapter.digest:
            raise ValueError(f"the files of adapter {adapter.name!r} have changed since it was loaded: load it again")
        config, modules = files.parse()
        self._check(config, modules)
        parts = [[part for each in site for part in self._parts(each, config, modules)] for site in self.sites]
        return RankAdapter(adapter.digest, self.kernels.pack(parts))

    def check(self, files: PeftFiles) -> None:
        """Raises ValueError if they do not fit this model."""
        self._check(*files.parse())

    def _check(self, config: PeftConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
        places = {part.name: part for site in (*self.sites, *self.sites_elsewhere) for part in site}
        for name, matrices in modules.items():
            place = places.get(name)
            if place is None:
                raise ValueError(
                    f"{WEIGHTS} has {name}, which is no linear layer of this model that adapters may change"
                )
            if not config.changes(name):
                raise ValueError(f"{WEIGHTS} has {name}, which is not among target_modules")
            self._check_module(name, place, config.rank_of(name), matrices)
        missing = [name for name in places if config.changes(name) and name not in modules]
        if missing:
            raise ValueError(f"target_modules has {missing[0]}, and {WEIGHTS} has no tensors of it")
        if not modules:
            raise ValueError(f"{WEIGHTS} has no tensors")

    def _check_module(self, name: str, place: SitePart, rank: int, matrices: Mapping[str, Tensor]) -> None:
        if rank > self.limits.max_rank:
            raise ValueError(f"{name} has rank {rank}, over the limit of {self.limits.max_rank} (max_lora_rank)")
        allowed = self.limits.modules
        if allowed and not any(name == each or name.endswith(f".{each}") for each in allowed):
            raise ValueError(f"{name} is not among lora_target_modules: {', '.join(allowed)}")
        shapes = {"A": (rank, place.num_inputs), "B": (place.num_outputs, rank)}
        for kind, shape in shapes.items():
            if kind not in matrices:
                raise ValueError(f"{WEIGHTS} has no lora_{kind} of {name}")
            if tuple(matrices[kind].shape) != shape:
                raise ValueError(
                    f"lora_{kind} of {name} is {list(matrices[kind].shape)}, must be {list(shape)} for this model and "
                    "this adapter_config.json"
                )
            if not matrices[kind].isfinite().all():
                raise ValueError(f"lora_{kind} of {name} has numbers that are not finite")

    def _parts(
        self, place: SitePart, config: PeftConfig, modules: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[UpdatePart]:
        matrices = modules.get(place.name)
        if matrices is None:
            return
        a_RK = matrices["A"][:, place.columns.start : place.columns.stop]
        b_NR = matrices["B"][place.rows.start : place.rows.stop].float() * config.scale_of(place.name)
        part = UpdatePart(a_RK.to(self.device, self.dtype), b_NR.to(self.device, self.dtype), place.first)
        if not (part.a_RK.isfinite().all() and part.b_NR.isfinite().all()):
            raise ValueError(f"{place.name} has numbers that {self.dtype} does not hold")
        yield part
