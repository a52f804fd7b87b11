"""Transformers without torch, in processes that need its tokenizers alone."""

from __future__ import annotations


def hide_torch_from_transformers() -> None:
    """Let what transformers imports from now on believe that there is no torch. Call it before a tokenizer is loaded.

    Its tokenizers need none, and yet import it: 1.4 s of processor time and 230 MB, and 0.5 s where torch is there for
    another reason (transformers 5.24). A tokenizer's own code may still import torch.
    """
    from transformers import utils
    from transformers.utils import import_utils

    import_utils.is_torch_available = _is_not_available
    utils.is_torch_available = _is_not_available


def _is_not_available() -> bool:
    return False
