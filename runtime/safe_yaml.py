"""YAML from strangers: limits first, then a safe load that refuses duplicate keys.

The C loader of PyYAML crashes on deep nesting, alias bombs load at once and explode later, and duplicate keys win
silently; so the events are walked first, without building anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000


class BadYaml(Exception):
    """A YAML file that will not be loaded: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str = "correct the file and run again") -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadYaml(f"line {key_node.start_mark.line + 1}", "a key that is no plain value", "text keys")
            key = self.construct_object(key_node)
            if key in seen:
                raise BadYaml(f"line {key_node.start_mark.line + 1}", f"key {key!r} twice", "each key once")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 12:30:00 as 45000, and 2026-11-23 as a date; text stays text here, and `no` must be written false
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:timestamp",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _check_events(text: str, name: str) -> None:
    depth = nodes = documents = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = event.start_mark
            where = f"{name}:{mark.line + 1 if mark else 1}"
            if isinstance(event, yaml.AliasEvent):
                raise BadYaml(where, f"alias *{event.anchor}", "values written out, no aliases")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise BadYaml(where, "a second document", "one document a file")
            if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise BadYaml(where, f"nesting deeper than {MAX_DEPTH}", f"at most {MAX_DEPTH} levels")
            if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                depth -= 1
            if isinstance(event, yaml.NodeEvent):
                nodes += 1
                if nodes > MAX_NODES:
                    raise BadYaml(where, f"more than {MAX_NODES} values", f"at most {MAX_NODES} values")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadYaml(f"{name}:{line}", error.problem or "broken YAML", "well-formed YAML") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise BadYaml(name, str(error).splitlines()[0], "well-formed YAML") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read one mapping from a YAML file of at most 1 MiB, 32 levels and 100,000 values, no alias and no key twice.

    Raises: BadYaml: anything else; the message names the file and the line. OSError: the file cannot be read.
    """
    path = Path(path)
    name = path.name
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        raise BadYaml(name, f"{len(data):,} bytes", f"at most {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadYaml(name, f"byte {error.start} is not UTF-8", "UTF-8 text", "save the file as UTF-8") from None
    _check_events(text, name)
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except BadYaml as error:
        raise BadYaml(f"{name}: {error.where}", error.found, error.allowed, error.todo) from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadYaml(name, str(error).splitlines()[0], "plain YAML values") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadYaml(name, f"a {type(value).__name__}", "a mapping of named fields")
    return value
