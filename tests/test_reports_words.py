"""Figures as people read them, tables, and the differences of two deployments."""

from __future__ import annotations

import csv
import doctest
import io
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.reports import changes, comparison, tables, words
from paretune.reports.chart import axis, staircase
from paretune.reports.tables import Table, as_csv, as_text
from paretune.runtime.spec import Deployment, Pool

positive = st.floats(1e-6, 1e9)
# a busy machine is slow, not wrong
unhurried = settings(deadline=None)
cells = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@pytest.mark.parametrize("module", [words, tables, comparison])
def test_examples_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed


@unhurried
@given(positive)
def test_dollars_are_off_by_less_than_a_percent(usd: float) -> None:
    text = words.dollars(usd)
    assert float(text[1:].replace(",", "")) == pytest.approx(usd, rel=0.006)
    assert "e" not in text


@unhurried
@given(positive)
def test_seconds_are_off_by_less_than_half_a_digit(value_s: float) -> None:
    number, unit = words.seconds(value_s, 3).split(" ")
    read_s = float(number.replace(",", "")) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit]
    assert read_s == pytest.approx(value_s, rel=0.0051)


@unhurried
@given(st.floats(0.5, 2.0))
def test_milliseconds_end_where_seconds_begin(value_s: float) -> None:
    number, unit = words.seconds(value_s).split(" ")
    assert (unit == "s") == (float(number.replace(",", "")) < 100)
    assert not number.startswith("1,0")


def test_unknown_figures_are_dashes_not_numbers() -> None:
    assert words.seconds(math.nan) == words.dollars(math.nan) == words.dollars(math.inf) == "—"


@unhurried
@given(st.lists(st.tuples(cells, cells), max_size=5))
def test_csv_reads_back_and_no_cell_starts_a_formula(rows: list[tuple[str, str]]) -> None:
    table = Table("t", ("a", "b"), tuple(rows))
    read = list(csv.reader(io.StringIO(as_csv(table), newline="")))
    assert len(read) == len(rows) + 1
    for line, row in zip(read[1:], rows):
        for cell, original in zip(line, row):
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
            assert cell in (original, f"'{original}")


def test_a_terminal_gets_no_control_characters() -> None:
    text = as_text(Table("\x1b[31mred", ("", "x"), (("a\x1b]0;title\x07", "1"), ("b\n", "22"))))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text.splitlines()) == 6


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        Table("t", ("a", "b"), (("1",),))


def test_every_field_of_a_pool_has_a_sentence() -> None:
    assert set(changes.WORDS) == set(Pool.model_fields)


def test_changes_name_each_field_before_and_after() -> None:
    before = Deployment()
    after = before.with_pool(max_num_seqs=32, weight_dtype="int8", enable_prefix_caching=False)
    found = changes.changes(before, after)
    assert [(each.field, each.before, each.after) for each in found] == [
        ("weight_dtype", "bf16", "int8"),
        ("max_num_seqs", "128", "32"),
        ("enable_prefix_caching", "yes", "no"),
    ]
    assert changes.diff(found)[2:4] == ("- max_num_seqs: 128", "+ max_num_seqs: 32")
    assert "at most 32 requests at once instead of 128" in found[1].words
    assert changes.changes(before, before) == ()


def test_pools_are_told_apart_by_their_place() -> None:
    prefill, decode = Pool(role="prefill"), Pool(role="decode")
    before = Deployment(pools=(prefill, decode))
    after = Deployment(pools=(prefill, decode.model_copy(update={"replicas": 3})))
    assert [each.field for each in changes.changes(before, after)] == ["pools.1.replicas"]
    assert [each.field for each in changes.changes(Deployment(), after)] == ["pools"]


@unhurried
@given(st.lists(positive, min_size=1, max_size=9))
def test_an_axis_shows_every_value_and_a_few_ticks(values: list[float]) -> None:
    shown = axis(values)
    assert all(0 <= shown.share(value) <= 1 for value in values)
    assert all(shown.low <= value <= shown.high for value in values)
    assert shown.share(min(values)) < shown.share(max(values)) or min(values) == max(values)
    ticks = shown.ticks()
    assert list(ticks) == sorted(ticks)
    assert all(shown.low * 0.999 <= tick <= shown.high * 1.001 for tick in ticks)


@unhurried
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=9))
def test_no_place_lies_below_the_staircase(places: list[tuple[float, float]]) -> None:
    steps = staircase(places, 2e9)
    assert list(steps) == sorted(steps, key=lambda step: (step[0], -step[1]))
    for x, y in places:
        assert y >= min(cost for wait, cost in steps if wait <= x)


def test_the_front_door_loads_nothing_heavy() -> None:
    code = (
        "import sys, paretune.reports; "
        "print([name for name in ('torch', 'optuna', 'matplotlib', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
