"""A set of 64-bit numbers that takes 12 to 32 bytes for each, where Python's takes about 100."""

from __future__ import annotations

from array import array

import numpy as np


class Distinct:
    """Hashes seen so far, in a table with linear probing (Knuth 1973, section 6.4, algorithm L).

    The place of a hash is given by its upper bits, so the table is all but sorted: growing it is one pass. The room
    behind the last place is longer than any run of evenly spread hashes (under 200 in 2²⁴), so nothing has to wrap
    around.
    """

    SPARE = 1024

    def __init__(self, bits: int = 10):
        self.count = 0
        self._make(bits)

    def __len__(self) -> int:
        return self.count

    def add(self, number: int) -> bool:
        """Whether `number` (64 bits, evenly spread) was not there before. 0 counts as 1."""
        number = number or 1
        place = number >> self.shift
        table = self.table
        while (found := table[place]) != 0:
            if found == number:
                return False
            place += 1
        table[place] = number
        self.count += 1
        if self.count > self.most:
            self._grow()
        return True

    def _make(self, bits: int) -> None:
        self.bits, self.shift = bits, 64 - bits
        self.most = (1 << bits) * 5 // 8
        self.table = array("Q", bytes(8 * ((1 << bits) + self.SPARE)))

    def _grow(self) -> None:
        """A table of twice the size: in order of their hashes, each goes to its place or right behind the last."""
        old = np.frombuffer(self.table, np.uint64)
        numbers = np.sort(old[old != 0])
        self._make(self.bits + 1)
        count = np.arange(len(numbers))
        places = np.maximum.accumulate((numbers >> np.uint64(self.shift)).astype(np.int64) - count) + count
        np.frombuffer(self.table, np.uint64)[places] = numbers
