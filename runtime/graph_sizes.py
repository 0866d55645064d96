"""Which decode steps are captured as CUDA graphs, and to how many rows a step is padded. No torch: searches ask."""

from __future__ import annotations

from collections.abc import Sequence

from .spec import CPU, Pool

_MOST = 512


def captured_sizes(pool: Pool) -> tuple[int, ...]:
    """Rows of the captured decode steps, ascending; empty where nothing is captured.

    Left to itself as vLLM 0.32 chooses (1, 2, 4, every 8 up to 256, every 16 up to 512), but no more than max_num_seqs,
    beyond which no decode step goes.

    >>> captured_sizes(Pool(accelerator="H100", max_num_seqs=20))
    (1, 2, 4, 8, 16, 20)
    """
    if pool.accelerator == CPU or pool.enforce_eager:
        return ()
    if pool.cuda_graph_sizes:
        return pool.cuda_graph_sizes
    most = min(pool.max_num_seqs, _MOST)
    usual = (1, 2, 4, *range(8, 256, 8), *range(256, _MOST + 1, 16))
    return (*(size for size in usual if size < most), most)


def padded_rows(sizes: Sequence[int], rows: int) -> int | None:
    """Rows of the smallest captured step that holds so many; None: it is not captured.

    >>> padded_rows((1, 2, 4, 8), 5), padded_rows((1, 2, 4, 8), 9)
    (8, None)
    """
    return next((size for size in sizes if size >= rows), None)
