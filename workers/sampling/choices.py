"""`TokenChoices`: the sampler's calls of a step, replayed from CUDA graphs where `warm_up` has captured them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from tensorweave.kernels.cuda.capture import GraphCapture, no_collection
from tensorweave.kernels.sample.chosen import Sampler
from tensorweave.kernels.sample.rule import TokenTarget
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.sampling.row_parameters import RowParameters
from tensorweave.workers.step.pending import DeviceRows, StepLogits

# R rows of logits, V vocabulary

Kind = Literal["greedy", "random", "limited"]
_KINDS: tuple[Kind, ...] = ("greedy", "random", "limited")


class TokenChoices:
    """`parameters` are those of the rows that are chosen for next."""

    def __init__(self, sampler: Sampler, copies: HostCopies) -> None:
        self.parameters = RowParameters(copies)
        self._sampler = sampler
        self._device = copies.device
        self._target = TokenTarget.create(0, copies.device)
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, TokenTarget]] = {}

    def choose(self, logits_RV: Tensor, positions_R: Tensor | None, rows: DeviceRows | None) -> Tensor:
        """A token for each row, int64 on the device until the next call: the likeliest where `positions_R`, the places
        of the tokens in their sequences, is None, else as the parameters say."""
        kind: Kind = "greedy"
        if positions_R is not None:
            kind = "limited" if self.parameters.has_limits else "random"
        captured = self._graphs.get(self._key(kind, logits_RV, rows)) if self._graphs else None
        if captured is None:
            target = self._target_of(len(logits_RV), rows)
            self._choose(kind, logits_RV, positions_R, target)
        else:
            graph, target = captured
            graph.replay()
        return target.tokens_R

    def _choose(self, kind: Kind, logits_RV: Tensor, positions_R: Tensor | None, target: TokenTarget) -> None:
        if positions_R is None or kind == "greedy":
            self._sampler.argmax(logits_RV, target)
        else:
            parameters = self.parameters.of_rows(positions_R)
            self._sampler.sample(logits_RV, parameters, target, has_limits=kind == "limited")

    def _target_of(self, num_rows: int, rows: DeviceRows | None) -> TokenTarget:
        """The next call's tokens overwrite those of the one before."""
        if len(self._target.tokens_R) != num_rows:
            self._target = TokenTarget.create(num_rows, self._device)
        if rows is None:
            return self._target
        return TokenTarget(self._target.tokens_R, rows.slots_R, rows.tokens_S)

    def largest(self, logits_RV: Tensor) -> Tensor:
        """The place of each row's largest logit, in memory of its own."""
        target = TokenTarget.create(len(logits_RV), self._device)
        self._sampler.argmax(logits_RV, target)
        return target.tokens_R

    def _key(self, kind: Kind, logits_RV: Tensor, rows: DeviceRows | None) -> Any:
        """What a captured call has in it: its sizes and the addresses of its buffers."""
        if rows is None:
            return None
        addresses = [each.data_ptr() for each in (logits_RV, rows.slots_R, rows.positions_R, rows.tokens_S)]
        return kind, self.parameters.address, logits_RV.dtype, logits_RV.shape, *addresses

    def warm_up(self, steps: Iterable[StepLogits]) -> None:
        """Run each kind of choice once for each of these steps, which compiles its kernels, and capture it. The steps'
        logits may be any numbers; their newest tokens are overwritten."""
        largest_first = sorted(steps, key=lambda step: -len(step.sampled_RV))
        if not largest_first:
            return
        self.parameters.reserve(len(largest_first[0].sampled_RV))
        if self._device.type == "cuda":
            from tensorweave.kernels.compile_ahead import compile_ahead  # Triton is installed where there is a GPU

            compile_ahead(lambda: self._warm_all(largest_first))
        self._warm_all(largest_first)
        if self._device.type == "cuda":
            with no_collection():
                self._capture_all(largest_first)

    def _warm_all(self, steps: Iterable[StepLogits]) -> None:
        for step, kind in itertools.product(steps, _KINDS):
            self._warm(kind, step, self._target_of(len(step.sampled_RV), step.rows))

    def _warm(self, kind: Kind, step: StepLogits, target: TokenTarget) -> None:
        assert step.rows is not None
        self._choose(kind, step.sampled_RV, step.rows.positions_R, target)

    def _capture_all(self, steps: Iterable[StepLogits]) -> None:
        capture = GraphCapture(self._device)
        for step, kind in itertools.product(steps, _KINDS):
            target = self._target_of(len(step.sampled_RV), step.rows)
            graph = capture(functools.partial(self._warm, kind, step, target))
            self._graphs[self._key(kind, step.sampled_RV, step.rows)] = graph, target
