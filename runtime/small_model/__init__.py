"""A small Llama trained on Python's own standard library: perplexity is real, and it ships with the package."""
