"""`parsed`: Python source as a tree, whatever else runs in this process."""

from __future__ import annotations

import ast
import gc


def parsed(source: str, path: str = "<unknown>") -> ast.Module:
    """`ast.parse`, without the garbage collector: in Python 3.11 a finalizer that runs within a parse and parses too,
    as printing a traceback does, makes the outer one fail ("AST constructor recursion depth mismatch")."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, path)
    finally:
        if was_enabled:
            gc.enable()
