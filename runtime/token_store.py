"""The token ids of all live requests, and the hashes of their full blocks, in two arenas that the scheduler points to.

A request has one extent of units of block_size tokens: its token ids lie at unit * block_size, the hash of its i-th
block at unit + i (`State.hash_start` is the first unit). Extents are powers of two long and used again when a request
ends.
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from ..traces.prefix import prefix_hashes

_FIRST_UNITS = 1024


class TokenStore:
    """Extents of tokens and hashes. `tokens` and `hashes` are replaced by longer ones when they are full.

    tokens  (units * block_size,) int32
    hashes  (units,) int64  chained: equal hash <=> equal tokens up to and with that block, within this process
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens: NDArray[np.int32] = np.zeros(_FIRST_UNITS * block_size, np.int32)
        self.hashes: NDArray[np.int64] = np.zeros(_FIRST_UNITS, np.int64)
        self._used_units = 0
        self._free: dict[int, list[int]] = {}
        # nobody outside can make a prompt whose blocks collide with another's, or find out by timing whose they are
        self._salt = secrets.token_bytes(32)

    def hold(self, num_tokens: int) -> int:
        """First unit of an extent for so many tokens."""
        units = self._units(num_tokens)
        free = self._free.get(units)
        if free:
            return free.pop()
        unit = self._used_units
        self._used_units += units
        while self._used_units > self.hashes.shape[0]:
            self.tokens = np.concatenate([self.tokens, np.zeros_like(self.tokens)])
            self.hashes = np.concatenate([self.hashes, np.zeros_like(self.hashes)])
        return unit

    def give_back(self, unit: int, num_tokens: int) -> None:
        """The extent that `hold(num_tokens)` gave is free again."""
        self._free.setdefault(self._units(num_tokens), []).append(unit)

    def _units(self, num_tokens: int) -> int:
        return 1 << (-(-num_tokens // self.block_size) - 1).bit_length()

    def hash_blocks(self, unit: int, first: int, last: int) -> None:
        """Fill in the hashes of blocks first .. last - 1, whose tokens are there and whose predecessors are hashed.

        The hash before is hashed like one more token in front of the block, so that a prompt and an answer that grows
        block by block get the same.
        """
        for index in range(unit + first, unit + last):
            previous = self.hashes[index - 1] if index > unit else 0
            block = self.tokens[index * self.block_size : (index + 1) * self.block_size]
            self.hashes[index] = prefix_hashes([previous, *block.tolist()], self.block_size + 1, self._salt)[0]
