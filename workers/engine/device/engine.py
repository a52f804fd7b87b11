"""`DeviceEngine`: steps whose state stays on the device: newest tokens, block tables, intermediate results.

The host sends a few numbers a row and launches; nothing in a step waits for the device. Steps of decodes alone, and
small steps with prompt chunks, are replayed as CUDA graphs; others are launched kernel by kernel, which takes less than
they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.device_operations import DecodeRows, DeviceOperations
from tensorweave.workers.engine.device.adapter_places import NoAdapterPlaces, PlacesAdapters
from tensorweave.workers.engine.device.graphs import AdaptedRows, GraphSizes, StepGraphs
from tensorweave.workers.engine.device.mixed_step import MixedStep, largest, mixed_sizes
from tensorweave.workers.engine.device.rank_exchange import RankExchange
from tensorweave.workers.engine.device.sequence_tables import SequenceTables
from tensorweave.workers.engine.device.step_inputs import MixedBuffer, MixedSize, StepInputs, size_of
from tensorweave.workers.engine.engine import PIECE_LOGITS
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.lora.rank_adapter import AdapterReader
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.models.device.steps import DecodeSteps, make_wide_layers
from tensorweave.workers.step.layer_marks import LayerMarks, NoLayerMarks
from tensorweave.workers.step.pending import DeviceRows, Pending, PendingTokens, Ready, StepLogits
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.resources import BaseResourceManager, KVCache, ResourceManager

# T tokens, D hidden size, R rows that sample, N rows of logits, V vocabulary

StepSize = int | AdaptedRows | MixedSize


class DeviceEngine:
    """One rank's model, its KV pool, and its sequences' state on the device.

    Args:
        buffers: for the largest step.
        sizes: of decode steps that are captured. Where there are any, small steps with prompt chunks are, too.
        ranks: what this rank exchanges with others.
        adapters: those on the device. `adapter_reader` reads others; None: there are none.
    """

    def __init__(
        self,
        model: DeviceModel,
        operations: DeviceOperations,
        pool: KVPool,
        info: ModelInfo,
        buffers: StepBuffers,
        sizes: GraphSizes,
        ranks: RankExchange,
        adapters: PlacesAdapters,
        adapter_reader: AdapterReader | None = None,
    ) -> None:
        self.info = info
        self.adapter_reader = adapter_reader
        self._adapters = adapters
        self.vocabulary = ranks.vocabulary
        self.pool = pool
        self._model = model
        self._operations = operations
        self._ranks = ranks
        device, P, max_rows = model.device, pool.tokens_per_block, buffers.max_rows
        self._tables = SequenceTables(max_rows, -(-info.max_seq_len // P))
        self.resource_managers: tuple[BaseResourceManager, ...] = (self._tables,)
        self._inputs = StepInputs(max_rows, buffers.max_tokens, self._tables, adapters, P, device)
        self._buffers = buffers
        self._wide = make_wide_layers(model, operations, self._buffers, ranks.sums, adapters.stacks)
        plain = make_wide_layers(model, operations, self._buffers, ranks.sums, ()) if adapters.stacks else self._wide
        parts = (model, operations, self._buffers)
        self._decodes = DecodeSteps(*parts, plain, pool.layers)
        self._adapted_decodes = DecodeSteps(*parts, self._wide, pool.layers, adapters.stacks)
        self._mixed = MixedStep(model, operations, self._buffers, self._inputs, self._wide, pool.layers, adapters)
        self._sizes = sizes
        self._mixed_sizes = mixed_sizes(max_rows, buffers.max_tokens) if sizes.sizes else ()
        self._small = MixedBuffer(largest(self._mixed_sizes), device)
        self.graphs: StepGraphs[StepSize] = StepGraphs(self._make_step, device)
        self._marks: LayerMarks = NoLayerMarks()
        self._num_pieces = 0
        self._num_launched = 0

    @property
    def has_own_keys(self) -> bool:
        """Whether keys in the cache have an order of their elements that other engines do not have."""
        return self._model.has_reordered_heads

    @property
    def progress(self) -> int:
        return self._num_launched + self._num_pieces

    def largest_decode(self, num_rows: int) -> StepSize:
        """A step of so many decodes, in the form that has the most kernels."""
        return AdaptedRows(num_rows) if self._adapters.stacks else num_rows

    @property
    def captured_sizes(self) -> tuple[StepSize, ...]:
        """Sizes of steps that are to be captured in graphs, ascending: those with prompt chunks come last. Decodes have
        graphs without adapters, and, where there may be adapters, others with them."""
        adapted = [AdaptedRows(num_rows) for num_rows in self._sizes.sizes if self._adapters.stacks]
        return (*self._sizes.sizes, *adapted, *self._mixed_sizes)

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        kv_cache = resources.kv_cache
        self._num_launched += 1
        with torch.no_grad():
            self.pool.copy_blocks(kv_cache.take_copies())
            num_rows = batch.num_samples
            num_padded = self._sizes.padded(num_rows) if num_rows else 0
            if batch.context or batch.drafts:
                return Ready(self._launch_mixed(batch, kv_cache, num_padded))
            self._inputs.send_decodes(batch, kv_cache, num_padded)
            self.graphs.run(AdaptedRows(num_padded) if self._adapters.are_in(batch) else num_padded)
            return Ready(self._logits(num_padded))

    def tell_layers(self, marks: LayerMarks) -> None:
        """From now on, tell how far steps with prompt chunks have come."""
        self._marks = marks

    def blank_steps(self) -> Iterator[StepLogits]:
        """Any logits for each number of rows that has a graph, in the buffers in which a step leaves them."""
        for num_rows in self._sizes.sizes:
            yield self._logits(num_rows)

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        with torch.no_grad():
            self.pool.wipe_blocks(block_ids)

    def _logits(self, num_padded: int, prompts: Iterator[tuple[PromptRead, Tensor]] | tuple[()] = ()) -> StepLogits:
        rows = self._inputs.rows(num_padded)
        device_rows = DeviceRows(rows.slots_R, rows.lengths_R, self._inputs.state.tokens_S)
        return StepLogits(self._buffers.logits_RV[:num_padded], prompts, device_rows, self._ranks.check)

    def _make_step(self, size: StepSize) -> Callable[[], None]:
        if isinstance(size, int):
            return self._make_decode(size, self._decodes, NoAdapterPlaces())
        if isinstance(size, AdaptedRows):
            return self._make_decode(size.num_rows, self._adapted_decodes, self._adapters)
        return lambda: self._mixed.run_rows(self._small, size, NoLayerMarks())

    def _make_decode(self, num_rows: int, decodes: DecodeSteps, adapters: PlacesAdapters) -> Callable[[], None]:
        rows, state, update = self._inputs.rows(num_rows), self._inputs.state, self._inputs.update
        tokens_R, places_R = self._buffers.tokens_T[:num_rows], self._buffers.all.places_T[:num_rows]
        layers = decodes.make(DecodeRows(rows.slots_R, rows.lengths_R, state, self.info.max_seq_len))

        def run() -> None:
            self._operations.begin_step(rows.slots_R, rows.given_tokens_R, state, update, tokens_R)
            adapters.begin_step(rows.places_R, places_R)
            layers()

        return run

    def _launch_mixed(self, batch: ScheduledBatch, kv_cache: KVCache, num_padded: int) -> StepLogits:
        size = size_of(batch)
        if not batch.prompt_reads:
            captured = next((each for each in self._mixed_sizes if each.holds(size)), None)
            if captured is not None:
                self._inputs.send_mixed(batch, kv_cache, self._small, captured, max(num_padded, captured.num_rows))
                self.graphs.run(captured)
                self._marks.pass_all()
                return self._logits(num_padded)
        self._inputs.send_mixed(batch, kv_cache, self._inputs.mixed, size, num_padded)
        if not batch.prompt_reads:
            self._mixed.run_rows(self._inputs.mixed, size, self._marks)
            return self._logits(num_padded)
        hidden_TD = self._mixed.run_all(self._inputs.mixed, size, self._marks)[size.num_decodes :]
        return self._logits(num_padded, self._prompt_logits(batch.prompt_reads, hidden_TD))

    def _prompt_logits(self, reads: Sequence[PromptRead], hidden_TD: Tensor) -> Iterator[tuple[PromptRead, Tensor]]:
        for read in reads:
            for piece in read.split(max(1, PIECE_LOGITS // self.info.vocab_size)):
                num_rows = piece.stop - piece.start
                logits_NV = torch.empty(num_rows, self._model.vocab_size, device=hidden_TD.device)
                with torch.no_grad():
                    rows_ND = hidden_TD[piece.row : piece.row + num_rows]
                    self._operations.product(rows_ND, self._model.head, logits_NV)
                self._num_pieces += 1
                yield piece, self.vocabulary.gather(logits_NV)
