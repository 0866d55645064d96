"""Prefix identity without text: keyed hashes of token blocks, and how they map onto an engine's KV-cache blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .columns import BadTrace


def prefix_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.integer], block_size: int, salt: bytes
) -> npt.NDArray[np.int64]:
    """Chained keyed hash of every whole block of a prompt.

    hash[i] = BLAKE2b(key=salt, hash[i - 1] + token ids of block i), 8 bytes: equal prefixes give equal hashes, and
    without the salt nobody can try prompts against them. The salt stays with the owner of the log: one salt for logs
    that shall share prefixes, in a file that nobody else can read and that is never passed on with them. Of n hashes
    two different ones collide with probability below n**2 / 2**65.

    Args:
        token_ids: of the prompt, each in 0 .. 2**63 - 1; tokens after the last whole block have no hash.
        block_size: tokens, >= 1.
        salt: 16 to 64 secret random bytes (`secrets.token_bytes(32)`).
    Returns: (len(token_ids) // block_size,) int64.
    Raises: ValueError: a block size below 1, or a salt of another length.
    """
    if block_size < 1 or not 16 <= len(salt) <= 64:
        raise ValueError(f"block_size {block_size} must be >= 1 and the salt 16 to 64 bytes, not {len(salt)}")
    ids = np.asarray(token_ids, dtype="<i8")
    blocks = len(ids) // block_size
    out = np.empty(blocks, dtype=np.int64)
    chain = b""
    for i in range(blocks):
        block = ids[i * block_size : (i + 1) * block_size].tobytes()
        chain = hashlib.blake2b(chain + block, digest_size=8, key=salt, person=b"paretune-prefix").digest()
        out[i] = int.from_bytes(chain, "little", signed=True)
    return out


def blocks_per_hash(trace_block_size: int, engine_block_size: int) -> int:
    """How many KV-cache blocks of an engine one prefix hash of a trace covers.

    Raises: BadTrace: the sizes do not divide, so a hash would end inside a block.

    >>> blocks_per_hash(512, 16)
    32
    """
    if engine_block_size < 1 or trace_block_size < engine_block_size or trace_block_size % engine_block_size:
        raise BadTrace(
            "block size",
            engine_block_size,
            f"a divisor of the {trace_block_size} tokens that one prefix hash of the trace covers",
            "choose another block size, or drop the trace's prefix hashes",
        )
    return trace_block_size // engine_block_size
