"""The Triton kernels compile for the GPUs that we run on; that takes Triton, and no GPU."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs")

from tensorweave.kernels.blocks import triton as blocks  # noqa: E402

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
