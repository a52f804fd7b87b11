"""`DeviceEngine`: steps whose state stays on the device: newest tokens, block tables, intermediate results.

The host sends a few numbers a row and launches; nothing in a step waits for the device. Steps of decodes alone are
replayed as CUDA graphs; steps with prompt chunks are launched kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.kernels.device_operations import DecodeAttention, DecodeRows, DeviceOperations
from tensorweave.kernels.weights import Matrix
from tensorweave.workers.engine.device.graphs import GraphSizes, StepGraphs
from tensorweave.workers.engine.device.sequence_tables import SequenceTables
from tensorweave.workers.engine.device.step_inputs import PromptInputs, RowInputs, StepInputs
from tensorweave.workers.engine.engine import PIECE_LOGITS
from tensorweave.workers.engine.kv_pool import KVPool
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.models.device.steps import DecodeSteps
from tensorweave.workers.models.device.wide import DecodeLayerAttention, MixedLayerAttention, WideLayers
from tensorweave.workers.step.pending import DeviceRows, Pending, PendingTokens, Ready, StepLogits
from tensorweave.workers.step.plan import PromptRead, ScheduledBatch
from tensorweave.workers.step.resources import BaseResourceManager, ResourceManager

# T tokens, D hidden size, R rows that sample, N rows of logits, V vocabulary


class DeviceEngine:
    """One rank's model, its KV pool, and its sequences' state on the device.

    Args:
        buffers: for the largest step.
        graphs: which decode steps are captured.
    """

    def __init__(
        self,
        model: DeviceModel,
        operations: DeviceOperations,
        pool: KVPool,
        info: ModelInfo,
        buffers: StepBuffers,
        graphs: GraphSizes,
    ) -> None:
        self.info = info
        self.pool = pool
        self._model = model
        self._operations = operations
        device, P, max_rows = model.device, pool.tokens_per_block, buffers.max_rows
        self._tables = SequenceTables(max_rows, -(-info.max_seq_len // P))
        self.resource_managers: tuple[BaseResourceManager, ...] = (self._tables,)
        self._inputs = StepInputs(max_rows, buffers.max_tokens, self._tables, P, device)
        self._buffers = buffers
        self._wide = WideLayers(model, operations, self._buffers)
        self._decodes = DecodeSteps(model, operations, self._buffers, self._wide, pool.layers)
        self.graphs = StepGraphs(graphs, self._make_decode, device)
        self._num_pieces = 0
        self._num_launched = 0

    @property
    def progress(self) -> int:
        return self._num_launched + self._num_pieces

    def launch(self, batch: ScheduledBatch, resources: ResourceManager, before: PendingTokens) -> Pending[StepLogits]:
        kv_cache = resources.kv_cache
        self._num_launched += 1
        with torch.no_grad():
            self.pool.copy_blocks(kv_cache.take_copies())
            num_rows = len(batch.sampled)
            num_padded = self.graphs.padded(num_rows) if num_rows else 0
            if not batch.context:
                self._inputs.send_rows(batch, kv_cache, num_padded)
                self.graphs.run(num_padded)
                return Ready(self._logits(num_padded))
            prompts = self._inputs.send_prompts(batch, kv_cache)
            self._inputs.send_rows(batch, kv_cache, num_padded)
            hidden_TD = self._run_mixed(prompts, num_rows, needs_all=bool(batch.prompt_reads))
            return Ready(self._logits(num_padded, self._prompt_logits(batch.prompt_reads, hidden_TD)))

    def blank_steps(self) -> Iterator[StepLogits]:
        """Of each number of rows that has a graph: any logits, in the buffers in which a step leaves them."""
        for num_rows in self.graphs.sizes:
            yield self._logits(num_rows)

    def wipe_blocks(self, block_ids: Sequence[int]) -> None:
        with torch.no_grad():
            self.pool.wipe_blocks(block_ids)

    def _logits(self, num_padded: int, prompts: Iterator[tuple[PromptRead, Tensor]] | tuple[()] = ()) -> StepLogits:
        rows = self._inputs.row_inputs(num_padded)
        device_rows = DeviceRows(rows.slots_R, rows.lengths_R, self._inputs.state.tokens_S)
        return StepLogits(self._buffers.logits_RV[:num_padded], prompts, device_rows)

    def _make_decode(self, num_rows: int) -> Callable[[], None]:
        rows, state = self._inputs.row_inputs(num_rows), self._inputs.state
        tokens_R = self._buffers.tokens_T[:num_rows]
        layers = self._decodes.make(DecodeRows(rows.slots_R, rows.lengths_R, state, self.info.max_seq_len))

        def run() -> None:
            self._operations.begin_step(rows.slots_R, rows.given_tokens_R, state, rows.update, tokens_R)
            layers()

        return run

    def _run_mixed(self, prompts: PromptInputs, num_rows: int, *, needs_all: bool) -> Tensor:
        """Leave logits of the rows that sample; return hidden states after the final norm, of all tokens if they are
        needed."""
        state, buffers, operations = self._inputs.state, self._buffers, self._operations
        num_prompt, num_tokens = len(prompts.token_ids_T), len(prompts.positions_T)
        num_decodes = num_tokens - num_prompt
        rows = self._inputs.row_inputs(num_rows, num_rows - num_decodes)
        buffers.tokens_T[:num_prompt].copy_(prompts.token_ids_T)
        operations.begin_step(
            rows.slots_R, rows.given_tokens_R, state, rows.update, buffers.tokens_T[num_prompt:num_tokens]
        )
        decode = self._attention(rows) if num_decodes else None
        plan = operations.plan_prefill(prompts.chunks, state)
        attention = MixedLayerAttention(operations, prompts.kv_slots_T, prompts.positions_T, plan, decode, num_prompt)
        caches, sampled_R = self.pool.layers, prompts.sampled_rows_R
        if needs_all:
            hidden_TD = self._wide(num_tokens, attention, caches)
            hidden_RD = hidden_TD.index_select(0, sampled_R)
        else:
            of_rows = DecodeLayerAttention(self._attention(self._inputs.row_inputs(num_rows))) if num_rows else None
            hidden_TD = hidden_RD = self._wide.of_rows(num_tokens, attention, sampled_R, of_rows, caches)
        if num_rows:
            operations.product(hidden_RD, Matrix(self._model.head_VD), buffers.logits_RV[:num_rows])
        return hidden_TD

    def _attention(self, rows: RowInputs) -> DecodeAttention:
        decode_rows = DecodeRows(rows.slots_R, rows.lengths_R, self._inputs.state, self.info.max_seq_len)
        return self._operations.decode_attention(decode_rows, self._model.num_heads, self.pool.layers[0])

    def _prompt_logits(self, reads: Sequence[PromptRead], hidden_TD: Tensor) -> Iterator[tuple[PromptRead, Tensor]]:
        for read in reads:
            for piece in read.split(max(1, PIECE_LOGITS // self.info.vocab_size)):
                num_rows = piece.stop - piece.start
                logits_NV = torch.empty(num_rows, self._model.vocab_size, device=hidden_TD.device)
                with torch.no_grad():
                    rows_ND = hidden_TD[piece.row : piece.row + num_rows]
                    self._operations.product(rows_ND, Matrix(self._model.head_VD), logits_NV)
                self._num_pieces += 1
                yield piece, logits_NV
