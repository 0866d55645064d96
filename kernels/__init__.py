"""The operators of a transformer and their tiles. Imports nothing else of paretune.

One file per operator: `linear`, `decode_attention`, `prefill_attention`, `fused`, each with its float64 reference and
its launchers; `decoder` calls them for all layers at once. The Triton kernels stand in files of their own, imported
only where they are used. The names below need no torch.
"""

from .tiles import PRECISIONS, BadTile, Tile, TileTable, bucket

__all__ = ["PRECISIONS", "BadTile", "Tile", "TileTable", "bucket"]
