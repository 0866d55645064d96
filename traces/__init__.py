"""Request logs: read, describe, compare, transform. Imports nothing else of paretune."""

from .describe import fingerprint, statistics
from .drift import drift
from .formats import BadTrace, read, sample_path, write
from .metrics import BadTarget, Metric, Target
from .trace import Trace
from .transform import clip, sample, scale, window, with_targets

__all__ = [
    "BadTarget",
    "BadTrace",
    "Metric",
    "Target",
    "Trace",
    "clip",
    "drift",
    "fingerprint",
    "read",
    "sample",
    "sample_path",
    "scale",
    "statistics",
    "window",
    "with_targets",
    "write",
]
