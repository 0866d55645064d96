"""Request logs: read, describe, split, transform. Imports nothing else of paretune."""
