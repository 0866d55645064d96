"""The documents say what the code does. `python tests/test_reports_docs.py` writes the tables of docs/spec.md anew."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretune.optimizer.space import SearchSpace
from paretune.runtime.spec import Deployment, parse_deployment

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
MODELS = ("Deployment", "Pool", "KvTransfer", "Adapter", "Prediction", "Provenance")


def spec_page() -> str:
    return (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")


def written_table(text: str, model: str) -> str:
    begin, end = f"<!-- fields of {model}: begin -->\n", f"<!-- fields of {model}: end -->"
    return text[text.index(begin) + len(begin) : text.index(end)]


def schema_table(model: str) -> str:
    """The fields of a model as a Markdown table, from the JSON Schema."""
    schema = Deployment.model_json_schema(mode="validation")
    part = schema if model == "Deployment" else schema["$defs"][model]
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in part["properties"].items():
        default = "required" if name in part.get("required", ()) else shown_default(field)
        meaning = field.get("description", MEANING.get(name, ""))
        lines.append(f"| `{name}` | {shown_type(field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


# For fields whose name and type say it all but a reader new to the file.
MEANING = {
    "schema_version": "of this format; old versions are migrated or refused",
    "pools": "groups of identical replicas; the bundled engine runs one, of role `mixed`, no others",
    "predicted": "what was predicted of this deployment when it was picked",
    "provenance": "where it came from; null for a candidate that nobody picked",
    "tiles": "tile of each operator by precision and row bucket",
    "value": "the prediction itself",
    "paretune_version": "that wrote the file",
    "trace_source": "name of the request log",
    "trace_digest": "SHA-256 of its content",
    "profile_digest": "SHA-256 of the profile's content",
    "prices_as_of": "date of the price book",
    "study": "name of the study",
    "seed": "of the study",
}


def shown_type(field: dict[str, Any]) -> str:
    if "const" in field:
        return f"{field['const']}"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(shown_type(each) for each in field["anyOf"])
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if field.get("type") == "array":
        return f"list of {shown_type(field['items'])}"
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in field
    ]
    return ", ".join([field.get("type", "tile table"), *bounds])


def shown_default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "empty"
    value = field["default"]
    if isinstance(value, list):
        return "one default pool" if value else "empty"
    return f"`{yaml.safe_dump(value).splitlines()[0]}`"


@pytest.mark.parametrize("model", MODELS)
def test_spec_page_has_the_fields_of_the_schema(model: str) -> None:
    expected = schema_table(model)
    assert written_table(spec_page(), model) == expected, "run: python tests/test_reports_docs.py"
    for line in expected.splitlines()[2:]:
        assert not line.endswith("|  |"), f"nobody says what this field means: {line}"


def test_every_combination_the_spec_page_shows_is_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", spec_page(), re.DOTALL)
    whole, space, tiles, adapters = (yaml.safe_load(block) for block in blocks)
    assert parse_deployment(whole).targets == ("ttf30:p95<=600ms",)
    pool = {**whole["pools"][0], **tiles}
    assert len(parse_deployment({**whole, "pools": [pool]}).pool.tiles) == 1
    assert [adapter.name for adapter in parse_deployment(adapters).adapters] == ["support"]
    pools = [each.pool for each in SearchSpace.from_dict(space).candidates().deployments]
    assert [(each.speculation, each.num_speculative_tokens) for each in pools] == [
        ("none", 0),
        ("ngram", 2),
        ("ngram", 4),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]*)\)", text):
        other = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", other, re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_commands_in_the_documents_exist_with_their_options() -> None:
    cli = pytest.importorskip("paretune.cli", exc_type=ImportError).cli
    import click

    shown = 0
    for page in PAGES:
        for line in re.findall(r"^\$ (?:\.venv/bin/)?paretune (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            words = shlex.split(line, comments=True)
            command: Any = cli
            while isinstance(command, click.Group) and words and not words[0].startswith("-"):
                command = command.get_command(click.Context(command), words.pop(0))
                assert command is not None, f"{page.name}: paretune {line}"
            assert not isinstance(command, click.Group), f"{page.name}: paretune {line}"
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            given = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert given <= known, f"{page.name}: paretune {line}"
            shown += 1
    assert shown > 10


def test_the_readme_lists_the_exit_codes_that_errors_have() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)}
    assert listed == {0, 1, 2, 3, 5, 6, 75, 130}
    rooms = ("traces", "kernels", "runtime", "profiler", "optimizer", "reports")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    used = {
        int(code)
        for path in sources
        for code in re.findall(r"exit_code(?:: ClassVar\[int\])? = (\d+)", path.read_text(encoding="utf-8"))
    }
    assert used
    assert used <= listed


def test_every_word_of_the_command_line_is_in_the_glossary() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*) \|", glossary, re.MULTILINE)[1:]
    words = {word.strip().lower() for row in rows for word in row.split(",")}
    assert words >= {"trace", "profile", "simulate", "front", "pick", "replay", "verify", "study", "slo", "tile"}
    assert len(rows) == len(set(rows)), "one meaning each"


if __name__ == "__main__":
    page = spec_page()
    for each in MODELS:
        begin = f"<!-- fields of {each}: begin -->\n"
        page = page.replace(begin + written_table(page, each), begin + schema_table(each))
    (ROOT / "docs" / "spec.md").write_text(page, encoding="utf-8")
