"""`TokenChoices`: the sampler's calls of a step, replayed from CUDA graphs where `warm_up` has captured them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tensorweave.kernels.cuda.capture import GraphCapture, no_collection
from tensorweave.kernels.sample.chosen import Sampler
from tensorweave.kernels.sample.rule import TokenTarget
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.sampling.row_parameters import RowParameters
from tensorweave.workers.step.pending import DeviceRows, StepLogits
from tensorweave.workers.step.vocabulary import Vocabulary

# R rows of logits, V vocabulary

Kind = Literal["greedy", "random", "limited"]
_KINDS: tuple[Kind, ...] = ("greedy", "random", "limited")
_SHARE_KINDS: tuple[Kind, ...] = ("greedy", "random")


@dataclass(frozen=True, slots=True)
class _Call:
    sampler: Sampler
    kind: Kind
    logits_RV: Tensor
    rows: DeviceRows


class TokenChoices:
    """`parameters` are those of the rows that are chosen for next."""

    def __init__(self, sampler: Sampler, copies: HostCopies, vocabulary: Vocabulary) -> None:
        self.parameters = RowParameters(copies)
        self._sampler = sampler
        self._vocabulary = vocabulary
        self._device = copies.device
        self._target = TokenTarget.create(0, copies.device)
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, TokenTarget]] = {}

    def choose(
        self, logits_RV: Tensor, positions_R: Tensor | None, rows: DeviceRows | None, *, is_share: bool = False
    ) -> Tensor:
        """A token for each row, int64 on the device until the next call: the likeliest where `positions_R`, the places
        of the tokens in their sequences, is None, else as the parameters say.

        `is_share`: the logits are those of this rank's tokens, and no row has limits.
        """
        kind: Kind = "greedy"
        if positions_R is not None:
            kind = "limited" if self.parameters.has_limits else "random"
        captured = self._graphs.get(self._key(kind, logits_RV, rows)) if self._graphs else None
        if captured is None:
            target = self._target_of(len(logits_RV), rows)
            self._choose(self._sampler_of(is_share), kind, logits_RV, positions_R, target)
        else:
            graph, target = captured
            graph.replay()
        return target.tokens_R

    def _sampler_of(self, is_share: bool) -> Sampler:
        sampler = self._vocabulary.sampler if is_share else self._sampler
        assert sampler is not None
        return sampler

    def _choose(
        self, sampler: Sampler, kind: Kind, logits_RV: Tensor, positions_R: Tensor | None, target: TokenTarget
    ) -> None:
        if positions_R is None or kind == "greedy":
            sampler.argmax(logits_RV, target)
        else:
            parameters = self.parameters.of_rows(positions_R)
            sampler.sample(logits_RV, parameters, target, has_limits=kind == "limited")

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
        for call in self._calls(steps):
            self._warm(call, self._target_of(len(call.logits_RV), call.rows))

    def _calls(self, steps: Iterable[StepLogits]) -> Iterator[_Call]:
        """Each kind of choice for each step, on the logits of this rank's tokens, where that is a kind, and of all."""
        for step in steps:
            assert step.rows is not None
            for kind in _KINDS:
                yield _Call(self._sampler, kind, self._vocabulary.whole(step.sampled_RV), step.rows)
            if (sampler := self._vocabulary.sampler) is not None:
                for kind in _SHARE_KINDS:  # last: by gathering before, all ranks have come here
                    yield _Call(sampler, kind, step.sampled_RV, step.rows)

    def _warm(self, call: _Call, target: TokenTarget) -> None:
        self._choose(call.sampler, call.kind, call.logits_RV, call.rows.positions_R, target)

    def _capture_all(self, steps: Iterable[StepLogits]) -> None:
        capture = GraphCapture(self._device)
        for call in self._calls(steps):
            target = self._target_of(len(call.logits_RV), call.rows)
            graph = capture(functools.partial(self._warm, call, target))
            self._graphs[self._key(call.kind, call.logits_RV, call.rows)] = graph, target
