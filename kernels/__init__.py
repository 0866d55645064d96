"""The operators of a transformer and their tiles. Imports nothing else of paretune."""
