"""Which tables take the place of an accelerator's data sheet, as somebody says it: names of files, nothing read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

INSTALLED = "aiconfigurator-core"
"""The name of a package in place of a folder."""
_OPTIONS = {
    "operator-tables": "operator_tables",
    "layer-times": "layer_times",
    "step-times": "step_times",
    "tables-engine": "engine",
    "tables-version": "engine_version",
}


@dataclass(frozen=True)
class TableChoice:
    """Where step times of an accelerator come from, as typed; at most one of the first three, none: its data sheet.

    operator_tables  a folder of aiconfigurator's or Vidur's, or "aiconfigurator-core" for the installed package
    layer_times      a folder of LLMServingSim's profiler
    step_times       a file of whole steps: exported, or Splitwise's
    engine, engine_version  of aiconfigurator's tables alone: whose kernels, None: vllm's; without a version the newest
                            of each table
    """

    operator_tables: str | None = None
    layer_times: str | None = None
    step_times: str | None = None
    engine: str | None = None
    engine_version: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """Of the three, what was given."""
        named = {
            "operator tables": self.operator_tables,
            "layer times": self.layer_times,
            "step times": self.step_times,
        }
        return {name: value for name, value in named.items() if value is not None}

    def absolute(self) -> TableChoice:
        """The same files from every folder."""
        paths = {
            name: str(Path(value).absolute())
            for name in ("operator_tables", "layer_times", "step_times")
            if (value := getattr(self, name)) is not None and value != INSTALLED
        }
        return replace(self, **paths)

    def options(self) -> dict[str, str]:
        """What was chosen, as options of the command line without their dashes; empty where nothing was."""
        if not self.given:
            return {}
        values = {name: getattr(self, field) for name, field in _OPTIONS.items()}
        return {name: value for name, value in values.items() if value is not None}

    def flags(self) -> dict[str, str]:
        """What was given, by its option on the command line."""
        values = {f"--{name}": getattr(self, field) for name, field in _OPTIONS.items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> TableChoice:
        """What `options` gave, among others."""
        return cls(**{field: options[name] for name, field in _OPTIONS.items() if name in options})
