"""paretune: the query optimizer for LLM serving. Start at the command line: `paretune --help`."""

__version__ = "0.1.0"
