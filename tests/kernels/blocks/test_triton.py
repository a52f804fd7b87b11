"""The Triton kernels compile for the GPUs that we run on, which takes Triton and no GPU; there they do what the torch
forms do."""

from __future__ import annotations

import random

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs")

from tensorweave.kernels.blocks import triton as blocks  # noqa: E402
from tensorweave.kernels.blocks.operations import choose_block_operations  # noqa: E402
from tensorweave.kernels.blocks.reference import as_blocks, digest_blocks, pack_blocks, unpack_blocks  # noqa: E402

COPY = {
    **dict.fromkeys(("pool_ptr", "packed_ptr", "ids_ptr"), "*i64"),
    **dict.fromkeys(("run_words", "layer_words", "block_words", "half_words", "first_word"), "i64"),
    "num_layers": "i32",
}
DIGEST = {
    **dict.fromkeys(("blocks_ptr", "ids_ptr", "tokens_ptr", "constants_ptr", "digests_ptr"), "*i64"),
    **dict.fromkeys(("layer_words", "block_words", "half_words", "head_words", "token_words"), "i64"),
    **dict.fromkeys(("num_layers", "num_heads"), "i32"),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "signature", "constants"),
    [
        (blocks._copy_runs, COPY, {"is_unpacking": False, "num_words": 1024}),
        (blocks._copy_runs, COPY, {"is_unpacking": True, "num_words": 1024}),
        (blocks._digest_runs, DIGEST, {"plane_words": 192, "fold": 33, "num_words": 512}),
    ],
)
def test_it_compiles(kernel: object, signature: dict[str, str], constants: dict[str, int], capability: int) -> None:
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "num_heads", "P", "H"), [(3, 3, 16, 64), (2, 8, 32, 128), (2, 1, 4, 6)])
def test_pack_and_digest(layers: int, num_heads: int, P: int, H: int, dtype: torch.dtype) -> None:
    pool = torch.randn((layers, 40, 2, num_heads, P, H)).to(dtype).to("cuda")
    block_ids = random.sample(range(40), 17)
    num_tokens = [random.randint(0, P) for _ in block_ids]
    for heads in (range(num_heads), range(num_heads - 1, num_heads)):
        out, right = (
            torch.full((17 * layers * 2 * len(heads) * P * H * dtype.itemsize,), 7, dtype=torch.uint8) for _ in "ab"
        )
        out, operations = out.to("cuda"), choose_block_operations(pool)
        operations.pack(pool, block_ids, heads, out)
        pack_blocks(pool.cpu(), block_ids, heads, right)
        assert torch.equal(out.cpu(), right)
        target, target_right = torch.zeros_like(pool), torch.zeros_like(pool.cpu())
        operations.unpack(target, block_ids, heads, out)
        unpack_blocks(target_right, block_ids, heads, right)
        assert torch.equal(target.cpu(), target_right)
        found = operations.digest(as_blocks(out, pool, len(heads)).transpose(0, 1), range(17), num_tokens)
        digests = digest_blocks(pool.cpu(), block_ids, num_tokens)
        assert torch.equal(found.cpu(), digests[:, :, heads.start : heads.stop])
        assert torch.equal(operations.digest(pool, block_ids, num_tokens).cpu(), digests)
