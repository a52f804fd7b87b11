"""What one grammar may take: the limits of its trial, and of what is kept of it."""

from __future__ import annotations

from typing import Final

MAX_TEXT_BYTES: Final = 256 << 10
"""Of a guide's text. Larger ones are refused before anything reads them."""
TRIAL_CPU_S: Final = 5
"""Processor time of a trial: of the compilation and of a few hundred masks."""
TRIAL_WALL_S: Final = 20.0
"""A trial on a busy machine gets little processor time."""
USUAL_CPU_S: Final = 0.04
"""Processor time of a trial at the usual priority: a schema of a few fields takes 25 ms."""
USUAL_SHARE: Final = 0.1
USUAL_MOST_S: Final = 0.2
"""Of a core, which trials together may take at that priority: each of the first five that come together, say."""
TRIAL_MEMORY_BYTES: Final = 1 << 30
"""What a trial may allocate beside the vocabulary."""
MAX_COMPILED_BYTES: Final = 128 << 20
"""Of one compiled grammar. That of a JSON schema with 200 fields takes about 3 MB."""
CACHE_BYTES: Final = 256 << 20
"""Of all compiled grammars that a rank keeps for later requests."""
CACHE_GRAMMARS: Final = 1024
MAX_TOKEN_S: Final = 0.02
"""Processor time of one token of one answer: to accept it, and to find those that may come next. 10 µs are usual with
xgrammar, 200 µs with llguidance."""
READY_TIMEOUT_S: Final = 30.0
"""For all ranks to compile what the trial has compiled within its limit."""
QUEUE_TIMEOUT_S: Final = 30.0
"""How long a request may wait for its grammar's trial to begin."""
NUM_TRIALS: Final = 2
"""Trials at the same time, so that one that runs into its limit does not keep the others waiting."""
START_TIMEOUT_S: Final = 180.0
"""For the process of the trials to load the tokenizer: three seconds of processor time, on a busy machine."""
