"""Reading a model's `config.json`: its fields, and the error that names the one that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar


class BadModel(Exception):
    """A model directory that cannot be served: where (file, field or tensor), what was found, what is allowed."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:120]}; allowed: {self.allowed}; {self.todo}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory. Raises: BadModel."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(str(path), error.strerror or error, "a readable file", "copy the model again") from None
    except ValueError as error:
        raise BadModel(str(path), f"no JSON ({error})", "a JSON object", "copy the model again") from None
    if not isinstance(content, dict):
        raise BadModel(str(path), type(content).__name__, "a JSON object", "copy the model again")
    return content


def size(config: Mapping[str, Any], field: str, name: str, default: int | None = None) -> int:
    """A field that counts something. Raises: BadModel: absent without a default, or no integer >= 1."""
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadModel(f"{name}: {field}", value, "an integer >= 1", "correct the config")
    return value


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """One token id, a list of them, or none. Raises: BadModel."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise BadModel(where, value, "a token id, or a list of them", "correct the config")
    return ids
