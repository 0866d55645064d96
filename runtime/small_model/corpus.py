"""The text of the small model: Python's own standard library, cut by file hash into training, validation and held-out.

Everything comes from the Python that runs: the `.py` files below its `stdlib` path (no tests, no installed packages, no
character tables) and the language topics of `pydoc_data`, all under the PSF licence (LICENSE-PSF.md). Each source file
gives two documents, the source itself and its prose (docstrings and longer comments), so that English weighs more.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Share = Literal["train", "validation", "heldout"]
SHARES_OF_HASH: dict[int, Share] = {0: "heldout", 1: "validation"}
HASH_BUCKETS = 50
HELDOUT_LIMIT_BYTES = {"topic": 20_000, "prose": 20_000, "source": 19_000}
HELDOUT_DOCUMENT_BYTES = 5_000
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
SKIPPED_FILES = frozenset({"stringprep.py", "html/entities.py"})
MIN_COMMENT_CHARS = 60
MIN_SHARED_PARAGRAPH_CHARS = 60


@dataclass(frozen=True)
class Document:
    """One text of the corpus; `name`, its path below the standard library (`#topic` for a topic), picks the share."""

    name: str
    kind: Literal["source", "prose", "topic"]
    text: str

    @property
    def share(self) -> Share:
        """2 % of the names are held out and 2 % are for validation, by SHA-256: the same on every Python version."""
        bucket = int.from_bytes(hashlib.sha256(f"paretune {self.name}".encode()).digest()[:8], "big") % HASH_BUCKETS
        return SHARES_OF_HASH.get(bucket, "train")


def documents(stdlib: Path | None = None) -> list[Document]:
    """Every document of the standard library at `stdlib` (default: of the running Python), sorted by name and kind."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    found = [document for path in sorted(root.rglob("*.py")) for document in _of_file(root, path)]
    topics = root / "pydoc_data" / "topics.py"
    if topics.is_file():
        found += [Document(f"pydoc_data/topics.py#{name}", "topic", text) for name, text in _topics(topics)]
    return sorted(found, key=lambda document: (document.name, document.kind))


def split(found: Iterable[Document]) -> dict[Share, list[Document]]:
    """The documents of each share; a training paragraph that also stands in validation or held-out text is taken out.

    Topics quote each other and modules share boilerplate; without this the held-out text would be partly known.
    """
    shares: dict[Share, list[Document]] = {"train": [], "validation": [], "heldout": []}
    for document in found:
        shares[document.share].append(document)
    unseen = {
        _squeezed(paragraph)
        for share in ("validation", "heldout")
        for document in shares[share]
        for paragraph in _paragraphs(document.text)
    }
    shares["train"] = [
        Document(document.name, document.kind, text)
        for document in shares["train"]
        if (text := _without(document.text, unseen)).strip()
    ]
    return shares


def heldout_text(shares: dict[Share, list[Document]]) -> str:
    """The fixed evaluation text: the start of held-out documents, at most HELDOUT_LIMIT_BYTES of each kind.

    Each document stands below its name. No file gives both prose and source; a paragraph that came before is left out.
    """
    pieces: list[str] = []
    names: set[str] = set()
    seen: set[str] = set()
    for kind, room in HELDOUT_LIMIT_BYTES.items():
        for document in (document for document in shares["heldout"] if document.kind == kind):
            text = _without(document.text, seen).strip().encode()[: min(HELDOUT_DOCUMENT_BYTES, room)]
            if not text or document.name in names:
                continue
            pieces.append(f"{document.name}\n\n{text.decode(errors='ignore').strip()}\n\n\n")
            room -= len(text)
            names.add(document.name)
            seen.update(_squeezed(paragraph) for paragraph in _paragraphs(document.text))
    return "".join(pieces)


def _of_file(root: Path, path: Path) -> Iterator[Document]:
    name = path.relative_to(root).as_posix()
    if SKIPPED_FOLDERS.intersection(name.split("/")) or name in SKIPPED_FILES or path.name.startswith("_sysconfigdata"):
        return
    with tokenize.open(path) as lines:
        source = lines.read()
    if not source.strip():
        return
    yield Document(name, "source", source)
    prose = _prose(name, source)
    if prose:
        yield Document(name, "prose", prose)


def _prose(name: str, source: str) -> str:
    """Docstrings, each below its dotted name, and comments of more than MIN_COMMENT_CHARS, in the order of the file."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = list(_docstrings(ast.parse(source), module)) + list(_comments(source))
    return "".join(f"{text}\n\n" for _, text in sorted(found))


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[int, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield getattr(node, "lineno", 0), f"{name}\n\n{docstring}\n"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Blocks of comment lines that stand directly below one another, marks and indentation taken off."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1:
            yield from _block(first, block)
            block, first = [], line
        block.append(token.string.lstrip("#").strip())
        last = line
    yield from _block(first, block)


def _block(line: int, block: list[str]) -> Iterator[tuple[int, str]]:
    text = "\n".join(block).strip()
    if len(text) >= MIN_COMMENT_CHARS and re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", text):
        yield line, text + "\n"


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """`topics` of pydoc_data/topics.py, read as a literal: nothing of the file is run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            yield from ast.literal_eval(node.value).items()


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if len(_squeezed(part)) >= MIN_SHARED_PARAGRAPH_CHARS]


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _without(text: str, unwanted: set[str]) -> str:
    parts = re.split(r"(\n\s*\n)", text)
    return "".join(part for part in parts if _squeezed(part) not in unwanted)
