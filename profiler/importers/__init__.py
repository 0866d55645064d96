"""Measured operator tables of others, read where they lie, checked against physics: what is impossible is refused,
what is odd is flagged, both are counted and listed. Times become seconds, message sizes bytes, contexts tokens."""

from .aiconfigurator import ENGINES, UNDERSTOOD, OperatorTables, installed_folder, read_tables, systems
from .checks import Finding, by_file
from .imported_file import write_tables
from .step_rows import write_steps

__all__ = [
    "ENGINES",
    "UNDERSTOOD",
    "Finding",
    "OperatorTables",
    "by_file",
    "installed_folder",
    "read_tables",
    "systems",
    "write_steps",
    "write_tables",
]
