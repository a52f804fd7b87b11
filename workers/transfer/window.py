"""`PoolWindow`: transfer's view of a rank's KV pool: it packs blocks into bytes, unpacks them, and digests them.

Packed, the heads [i, j) of one block are [layers, 2, j - i, P, H]: for each layer their keys, then their values;
several blocks follow each other. Packed bytes are in host memory or on the pool's GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tensorweave.cluster.cache_transceiver_config import DEFAULT_COPY_SMS
from tensorweave.kernels.blocks.operations import choose_block_operations, verifying_in_one_pass
from tensorweave.kernels.blocks.reference import Numbers, SomeBlocks, as_blocks
from tensorweave.workers.engine.kv_pool import KVPool

# L layers, B blocks, K KV heads of this rank, P block size in tokens, H head dim


@dataclass(frozen=True, slots=True)
class RunningCopy:
    """A copy into the pool that has been launched. `digests_NLK` are known once it is over."""

    digests_NLK: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> npt.NDArray[np.int64]:
        """Wait until it is over, which is bounded by its size; return the digests of what was copied. Raises
        RuntimeError if the GPU has failed."""
        if self.event is not None:
            self.event.synchronize()
        digests: npt.NDArray[np.int64] = self.digests_NLK.numpy()
        return digests


class PoolWindow:
    """`heads` are the KV heads of this rank, by their numbers in the model; `heads` arguments count from the rank's
    first.

    Args:
        copy_sms: most multiprocessors of a GPU that `pull` takes.
        is_direct: on a GPU, blocks are written before they are verified, in one pass, on streams that go ahead of the
            engine's.
    """

    def __init__(self, pool: KVPool, copy_sms: int = DEFAULT_COPY_SMS, *, is_direct: bool = False) -> None:
        num_layers, num_blocks, planes, P, H = pool.cache.shape
        self.num_layers = num_layers
        self.head_dim = H
        self.dtype_name = str(pool.cache.dtype).removeprefix("torch.")
        self.heads = range(pool.first_head, pool.first_head + planes // 2)
        self.tokens_per_block = P
        self.device = pool.cache.device
        self.num_blocks = num_blocks
        self.blocks_LB2KPH = pool.cache.view(num_layers, num_blocks, 2, planes // 2, P, H)
        self.copy_sms = copy_sms
        self._blocks = choose_block_operations(self.blocks_LB2KPH)
        is_on_host = self.device.type == "cpu"
        self._is_direct = is_direct and not is_on_host
        if self._is_direct:
            self._blocks = verifying_in_one_pass(self._blocks)
        self.memory = tensor_bytes(pool.cache.view(-1).view(torch.uint8)) if is_on_host else None

    @property
    def plane_bytes(self) -> int:
        """One head's keys, or values, in one block and layer."""
        return self.tokens_per_block * self.head_dim * self.blocks_LB2KPH.itemsize

    def use_own_stream(self) -> None:
        """Give the calling thread a CUDA stream of its own, so that it need not wait for the engine's kernels. If
        copies are direct, it goes ahead of them: what runs there is short, and somebody waits for it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            priority = -1 if self._is_direct else 0
            torch.cuda.set_stream(torch.cuda.Stream(self.device, priority=priority))  # type: ignore[no-untyped-call]

    def block_bytes(self, num_heads: int) -> int:
        num_layers, _, _, _, P, H = self.blocks_LB2KPH.shape
        return num_layers * 2 * num_heads * P * H * self.blocks_LB2KPH.itemsize

    def new_staging(self, num_bytes: int) -> Tensor:
        """Host bytes to pack into and unpack from, page-locked where the pool is on a GPU."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        """Fill `out`, which has len(block_ids) * block_bytes(len(heads)) bytes."""
        packed = out if out.device == self.device else torch.empty_like(out, device=self.device)
        self._blocks.pack(self.blocks_LB2KPH, block_ids, heads, packed)
        if packed is not out:
            out.copy_(packed, non_blocking=True)
        self._synchronize()

    def pieces(self, block_id: int, heads: range) -> list[memoryview]:
        """The memory that holds the packed bytes of a block, in order; for a pool in host memory."""
        assert self.memory is not None
        layer, block, side, head = (n * self.blocks_LB2KPH.itemsize for n in self.blocks_LB2KPH.stride()[:4])
        first = block_id * block + heads.start * head
        run = len(heads) * head
        if run == side:  # keys and values of all heads follow each other
            return [self.memory[at : at + 2 * run] for at in range(first, first + self.num_layers * layer, layer)]
        ends = range(first, first + self.num_layers * layer, layer)
        return [self.memory[at : at + run] for end in ends for at in (end, end + side)]

    def unpack(self, block_ids: Sequence[int], heads: range, payload: Tensor) -> None:
        self._blocks.unpack(self.blocks_LB2KPH, block_ids, heads, payload.to(self.device))
        self._synchronize()

    def write_verified(
        self,
        block_ids: Sequence[int],
        heads: range,
        payload: Tensor,
        num_tokens: Sequence[int],
        digests_NLK: npt.NDArray[np.int64],
    ) -> list[bool]:
        """Unpack the blocks, and return which ones match their digests [N, L, heads]; on a CPU only those are
        written."""
        expected = torch.from_numpy(digests_NLK)
        is_valid = self._blocks.unpack_verified(
            self.blocks_LB2KPH, block_ids, heads, payload.to(self.device), num_tokens, expected
        )
        self._synchronize()
        return is_valid

    def place_ids(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> tuple[Numbers, Numbers]:
        """The same numbers where `digests` needs them, for those who call it several times."""
        if self.device.type == "cpu":
            return block_ids, num_tokens
        ids, counts = (torch.tensor(n, dtype=torch.int64, device=self.device) for n in (block_ids, num_tokens))
        return ids, counts

    def pull(
        self, source: SomeBlocks, block_ids: Sequence[int], heads: range, num_tokens: Sequence[int], layers: range
    ) -> RunningCopy:
        """Begin to copy blocks into these: from the same layers and as many heads of a pool that this rank's GPU can
        read, which has all layers. The caller waits for the result, in any case."""
        from_layers = SomeBlocks(source.pool_LB2KPH[layers.start : layers.stop], source.block_ids, source.heads)
        to_layers = SomeBlocks(self.blocks_LB2KPH[layers.start : layers.stop], block_ids, heads)
        is_on_gpu = self.device.type == "cuda"
        shape = (len(block_ids), len(layers), len(heads))
        digests_NLK = torch.empty(shape, dtype=torch.int64, pin_memory=is_on_gpu)
        self._blocks.pull(from_layers, to_layers, num_tokens, digests_NLK, self.copy_sms)
        if not is_on_gpu:
            return RunningCopy(digests_NLK, None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return RunningCopy(digests_NLK, event)

    def digests(self, block_ids: Numbers, num_tokens: Numbers, layers: range | None = None) -> Tensor:
        """Digests of these blocks in the pool, of all layers or of some: [N, L, K] int64, on the host. Numbers that
        `place_ids` has placed cost the device no wait before the digests begin."""
        layers = layers or range(self.num_layers)
        pool_LB2KPH = self.blocks_LB2KPH[layers.start : layers.stop]
        return self._blocks.digest(pool_LB2KPH, block_ids, num_tokens).cpu()

    def digest(self, block_id: int, num_tokens: int) -> Tensor:
        return self.digests([block_id], [num_tokens])[0]

    def payload_digests(self, payload: Tensor, num_heads: int, num_tokens: Sequence[int]) -> Tensor:
        """Digests of these packed blocks: [N, L, heads] int64, on the host."""
        blocks_LB2KPH = as_blocks(payload, self.blocks_LB2KPH, num_heads).transpose(0, 1)
        return self._blocks.digest(blocks_LB2KPH, range(len(num_tokens)), num_tokens).cpu()

    def warm(self) -> None:
        """Compile the GPU kernels before a peer waits for them. Rewrites block 0 unchanged."""
        block = torch.empty(self.block_bytes(len(self.heads)), dtype=torch.uint8, device=self.device)
        heads = range(len(self.heads))
        self.pack([0], heads, block)
        self.unpack([0], heads, block)
        self.digest(0, self.tokens_per_block)
        self.payload_digests(block, len(heads), [self.tokens_per_block])
        if self._is_direct:
            itself = SomeBlocks(self.blocks_LB2KPH, [0], heads)
            self.pull(itself, [0], heads, [self.tokens_per_block], range(1)).wait()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a host tensor of bytes."""
    array: npt.NDArray[np.uint8] = tensor.numpy()
    return array.data
