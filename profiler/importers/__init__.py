"""Measured operator tables of others, read where they lie, checked against physics: what is impossible is refused,
what is odd is flagged, both are counted and listed. Times become seconds, message sizes bytes, contexts tokens."""

from .aiconfigurator import OperatorTables, installed_folder, read_tables, systems
from .checks import Finding

__all__ = ["Finding", "OperatorTables", "installed_folder", "read_tables", "systems"]
