"""Arrays of equal rows in one contiguous block: one thread writes, any number read without a lock.

Typical use::

    table = Columns({"stage": np.int8, "alpha": np.float32}, rows=1000)
    with table.writing():                  # the one writer
        table["stage"][3] = 2
        table["alpha"][3] = 0.5
    seen = table.snapshot()                # any thread: both of these writes, or neither
    seen["alpha"][3]

The protocol is a sequence lock (of the Linux kernel; H.-J. Boehm, *Can seqlocks get along with programming language
memory models?*, MSPC 2012): the version is odd while the writer is at work, and a reader takes its copy again when
the version was odd or has moved. The writer never waits for anybody. A reader's copy is one copy of memory that does
not give up the interpreter's lock, so on an interpreter that has one it is only ever repeated when the writer was
interrupted in the middle; the check of the version after it serves interpreters that have none.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["Columns", "Snapshot", "place"]

_ALIGNMENT = 64
"""Of each column, in bytes: a cache line, and what any element type of a device asks for."""


def place(columns: Mapping[str, type[np.generic]], rows: int) -> tuple[dict[str, slice], int]:
    """Where each column stands in a block, in bytes, and the bytes of the whole."""
    places, end = {}, 0
    for name, dtype in columns.items():
        size = np.dtype(dtype).itemsize * rows
        places[name] = slice(end, end + size)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


class Snapshot:
    """All columns as they were at one moment; arrays that can not be written to.

    Attributes:
        header: of that moment.
        version: of that moment; a later one is never smaller.
    """

    __slots__ = ("_data", "_table", "header", "version")

    def __init__(self, table: Columns, data: bytes, header: tuple[int, ...], version: int) -> None:
        self._table = table
        self._data = data
        self.header = header
        self.version = version

    def __getitem__(self, name: str) -> NDArray[Any]:
        place, dtype = self._table.places[name], self._table[name].dtype
        return np.frombuffer(self._data, dtype, (place.stop - place.start) // dtype.itemsize, place.start)


class Columns:
    """See the module.

    Args:
        columns: element type of each, by name.
        rows: of every column.

    Attributes:
        block: all columns in one piece of memory, to be copied elsewhere at once.
        header: numbers that belong to all rows; written like a column.
        version: odd while a write is under way. Only the writer changes it.
    """

    def __init__(self, columns: Mapping[str, type[np.generic]], rows: int) -> None:
        self.places, size = place(columns, rows)
        self.block: NDArray[np.uint8] = np.zeros(size, dtype=np.uint8)
        self._bytes = self.block.data
        self._arrays: dict[str, NDArray[Any]] = {
            name: self.block[self.places[name]].view(dtype) for name, dtype in columns.items()
        }
        self.header: tuple[int, ...] = ()
        self.version = 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The column itself, for the writer."""
        return self._arrays[name]

    def shown(self, name: str) -> NDArray[Any]:
        """The column as it is now and will be, for looking only: rows of several columns may not belong together."""
        view = self._arrays[name].view()
        view.flags.writeable = False
        return view

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Everything written inside is seen at once or not at all."""
        self.version += 1
        try:
            yield
        finally:
            self.version += 1

    def snapshot(self) -> Snapshot:
        """All columns as they were at one moment between two writes; from any thread."""
        while True:
            version = self.version
            if not version & 1:
                # Not `block.copy()`, which lets other threads run in the middle.
                data, header = bytes(self._bytes), self.header
                if version == self.version:
                    return Snapshot(self, data, header, version)
            time.sleep(0)
