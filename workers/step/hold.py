"""`Put`: how a request gets into the inbox, with what it waits for there: an adapter, a grammar."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tensorweave.cluster.protocol import GenerateRequest

Put = Callable[[GenerateRequest, Collection[bytes]], None]
"""The request arrives in the step loop when all of these holds are released, or with its end."""
