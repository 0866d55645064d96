"""`python -m paretune` is `paretune`."""

from .cli import main

main()
