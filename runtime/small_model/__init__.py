"""A small Llama trained on Python's own standard library: perplexity is real, and it ships with the package.

The folder itself is the model directory: `MODEL_DIR` can be given to anything that reads Hugging Face model folders. So
can `TERNARY_MODEL_DIR`, its twin that was trained ternary.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent
TERNARY_MODEL_DIR = MODEL_DIR / "ternary"
HELDOUT_TEXT = MODEL_DIR / "heldout.txt"

__all__ = ["HELDOUT_TEXT", "MODEL_DIR", "TERNARY_MODEL_DIR"]
