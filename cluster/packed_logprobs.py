"""`PackedLogprobs`: the log-probabilities of a whole prompt, as columns that are read a row at a time.

A prompt of 8,192 tokens with 20 likeliest each has 172,000 of them, all in one chunk. As objects they would hold up the
event loop that reads them for 0.3 s; packed they arrive as four byte strings, and rows are created when they are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_bytes, checked
from tensorweave.cluster.logprobs import Logprob, TokenLogprobs

_INT: Final[np.dtype[Any]] = np.dtype("<i4")
_COLUMNS: Final[tuple[np.dtype[Any], ...]] = (_INT, _INT, np.dtype("<f8"), _INT)


class PackedLogprobs(Sequence[TokenLogprobs]):
    """One row a token, each a tuple of `Logprob`. Immutable.

    The columns: where each row ends in the others; then token ids, log-probabilities and ranks, [N] each.
    """

    def __init__(self, columns: Sequence[npt.NDArray[Any]]) -> None:
        self._ends, *self._columns = columns

    @classmethod
    def pack(cls, rows: Sequence[TokenLogprobs]) -> PackedLogprobs:
        if isinstance(rows, cls):
            return rows
        ends = np.cumsum([len(row) for row in rows], dtype=_INT)
        values = list(zip(*itertools.chain.from_iterable(rows), strict=True)) or [(), (), ()]
        return cls([ends, *(np.array(column, dtype) for column, dtype in zip(values, _COLUMNS[1:], strict=True))])

    def to_wire(self) -> list[bytes]:
        return [column.tobytes() for column in (self._ends, *self._columns)]

    @classmethod
    def from_wire(cls, fields: Any) -> PackedLogprobs:
        """Raises WireError."""
        packed = [as_bytes(field, "prompt_logprobs") for field in checked(fields, "prompt_logprobs", list)]
        try:
            ends, *columns = [np.frombuffer(field, dtype) for field, dtype in zip(packed, _COLUMNS, strict=True)]
        except ValueError as error:
            raise WireError(f"malformed log-probabilities: {error}") from None
        num_logprobs = ends[-1] if len(ends) else 0
        if np.any(np.diff(ends, prepend=0) < 0) or {len(column) for column in columns} != {int(num_logprobs)}:
            raise WireError("the columns of packed log-probabilities do not fit together")
        return cls([ends, *columns])

    @property
    def num_logprobs(self) -> int:
        """The number of log-probabilities of all rows together."""
        return len(self._columns[0])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[TokenLogprobs]: ...

    def __getitem__(self, place: int | slice) -> TokenLogprobs | Sequence[TokenLogprobs]:
        if isinstance(place, slice):
            return [self._row(index) for index in range(*place.indices(len(self)))]
        return self._row(range(len(self))[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as lists, which it stands in for

    def _row(self, index: int) -> TokenLogprobs:
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        return tuple(map(Logprob, *(column[start:end].tolist() for column in self._columns)))
