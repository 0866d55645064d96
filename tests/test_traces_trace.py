"""traces/trace.py, columns.py, prefix.py: a Trace is valid by construction, immutable, and equal by its digest."""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.traces import BadTrace, Target, Trace, read, scale, window, with_targets, write
from paretune.traces import sample as draw
from paretune.traces.columns import Labels, PrefixHashes
from paretune.traces.metrics import BadTarget
from paretune.traces.prefix import blocks_per_hash, prefix_hashes

SALT = b"a secret of sixteen bytes or more"
TARGETS = [Target.parse(text) for text in ("ttf30:p95<=600ms", "voice/tpot:p99<=50ms", "e2e:p50<=20s", "ttft:p95<=1s")]


@st.composite
def traces(draw_from) -> Trace:
    """Any valid trace: simultaneous arrivals, rows with and without names, hashes and targets of their own."""
    n = draw_from(st.integers(1, 12))
    gaps = draw_from(st.lists(st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 1e4), min_size=n, max_size=n))
    lengths = st.lists(st.integers(1, 40) | st.integers(1, 2**31 - 1), min_size=n, max_size=n)
    names = st.lists(st.none() | st.sampled_from(["voice", "chat", "a/b", "é\0"]), min_size=n, max_size=n)
    input_tokens = draw_from(lengths)
    prefix = None
    if draw_from(st.booleans()):
        # the conversations of a small tree: request i repeats the first blocks of one of three documents
        documents = draw_from(st.lists(st.integers(0, 2), min_size=n, max_size=n))
        lens = [draw_from(st.integers(0, min(5, -(-tokens // 16)))) for tokens in input_tokens]
        prefix = PrefixHashes.of([[doc * 10 + i for i in range(k)] for doc, k in zip(documents, lens)], 16)
    shared = tuple(draw_from(st.lists(st.sampled_from(TARGETS[:2]), unique=True)))
    target = None
    if draw_from(st.booleans()):
        own = draw_from(st.lists(st.sampled_from([-1, len(shared), len(shared) + 1]), min_size=n, max_size=n))
        present = sorted({i for i in own if i >= 0})
        shared = (*shared, *(TARGETS[2:][i - len(shared)] for i in present))
        first = len(shared) - len(present)
        target = np.array([-1 if i < 0 else first + present.index(i) for i in own])
    return Trace(
        arrival_s=np.cumsum(gaps),
        input_tokens=np.array(input_tokens),
        output_tokens=np.array(draw_from(lengths)),
        app=Labels.of(draw_from(names)),
        adapter=Labels.of(draw_from(names)),
        session=Labels.of(draw_from(names)),
        prefix=prefix,
        targets=shared,
        target=target,
        source="hypothesis",
        notes=("a note",),
    )


def plain(n: int = 4, **columns: object) -> Trace:
    fields = {"arrival_s": np.arange(n) * 1.0, "input_tokens": np.full(n, 40), "output_tokens": np.full(n, 5)}
    return Trace(**{**fields, **columns})


@settings(max_examples=40)
@given(traces())
def test_parquet_gives_back_the_same_trace(tmp_path_factory, trace):
    path = tmp_path_factory.mktemp("parquet") / "trace.parquet"
    write(trace, path)
    back = read(path)
    assert back.digest() == trace.digest()
    assert (back.source, back.notes) == (trace.source, trace.notes)
    for target in trace.targets:
        np.testing.assert_array_equal(back.rows(target), trace.rows(target))


@settings(max_examples=40)
@given(traces())
def test_pandas_gives_back_the_same_trace(trace):
    back = Trace.from_pandas(trace.to_pandas())
    assert back.digest() == trace.digest()
    assert (back.source, back.notes) == (trace.source, trace.notes)


@settings(max_examples=40)
@given(traces())
def test_pickle_gives_back_the_same_trace(trace):
    assert pickle.loads(pickle.dumps(trace)).digest() == trace.digest()


@settings(max_examples=40)
@given(traces(), st.data())
def test_selecting_keeps_each_request_with_its_names_hashes_and_governing_targets(trace, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(trace), max_size=len(trace)).filter(any))
    rows = np.array(chosen)
    part = trace.select(rows)
    old = np.flatnonzero(rows)
    assert len(part) == len(old)
    for name in ("app", "adapter", "session"):
        before, after = getattr(trace, name), getattr(part, name)
        names = [None] * len(trace) if before is None else before.values()
        assert (after.values() if after else [None] * len(old)) == [names[i] for i in old]
    if trace.prefix is not None:
        for new, i in enumerate(old):
            np.testing.assert_array_equal(part.prefix.row(new), trace.prefix.row(i))
    for target in {*trace.targets, *part.targets}:
        np.testing.assert_array_equal(part.rows(target), trace.rows(target)[rows])


@settings(max_examples=40)
@given(traces())
def test_the_digest_sees_every_column(trace):
    changed = [
        {"arrival_s": trace.arrival_s + 0.5},
        {"input_tokens": np.where(trace.input_tokens > 2**30, 2**30, trace.input_tokens + 1)},
        {"output_tokens": np.where(trace.output_tokens > 2**30, 2**30, trace.output_tokens + 1)},
        {"app": Labels.of(["another"] * len(trace))},
        {"session": Labels.of(["another"] * len(trace))},
        {"prefix": PrefixHashes.of([[77]] * len(trace), 16)},
        {"prefix": PrefixHashes.of([[77]] * len(trace), 17)},
        {"targets": (Target.parse("itl:p99<=1s"),), "target": None},
        {"targets": (Target.parse("itl:p99<=1s"),), "target": np.zeros(len(trace))},
    ]
    fields = {name: getattr(trace, name) for name in Trace.__dataclass_fields__}
    digests = {trace.digest(), *(Trace(**{**fields, **change}).digest() for change in changed)}
    assert len(digests) == len(changed) + 1


def test_the_digest_does_not_depend_on_how_names_are_coded_nor_on_where_the_trace_came_from():
    one = plain(app=Labels(("a", "b"), np.array([1, 0, -1, 1])), source="x", notes=("y",))
    two = plain(app=Labels(("b", "unused", "a"), np.array([0, 2, -1, 0])))
    assert one.digest() == two.digest()


def test_the_columns_cannot_be_changed():
    mine = np.arange(4.0)
    trace = plain(arrival_s=mine, app=Labels.of(["a"] * 4), prefix=PrefixHashes.of([[1]] * 4, 16))
    for column in (trace.arrival_s, trace.input_tokens, trace.app.codes, trace.prefix.hashes, trace.prefix.offsets):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    mine[0] = 99
    assert trace.arrival_s[0] == 0


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ({"arrival_s": np.empty(0)}, "memory: arrival_s"),
        ({"arrival_s": np.array([0, 1, np.nan, 3])}, "memory: row 2: arrival_s"),
        ({"arrival_s": np.array([-1.0, 1, 2, 3])}, "memory: row 0: arrival_s"),
        ({"arrival_s": np.array([0, 2, 1, 3.0])}, "memory: row 2: arrival_s"),
        ({"arrival_s": np.array([0, 1, 2, np.inf])}, "memory: row 3: arrival_s"),
        ({"arrival_s": np.array([0, 1, 2, 1e300])}, "memory: row 3: arrival_s"),
        ({"input_tokens": np.array([1, 2, 0, 4])}, "memory: row 2: input_tokens"),
        ({"input_tokens": np.array([1, 2, 3])}, "memory: input_tokens"),
        ({"output_tokens": np.array([1, 2, 3, 2**31])}, "memory: row 3: output_tokens"),
        ({"output_tokens": np.array([1, 2, 3.5, 4])}, "memory: row 2: output_tokens"),
        ({"output_tokens": np.array(["1", "2", "3", "4"])}, "memory: output_tokens"),
        ({"app": Labels.of(["a"])}, "memory: app"),
        ({"prefix": PrefixHashes.of([[1]] * 3, 16)}, "memory: prefix"),
        ({"prefix": PrefixHashes.of([[1], [1], [1, 2, 3, 4], [1]], 16)}, "memory: row 2: prefix hashes"),
        ({"prefix": PrefixHashes.of([[1], [1, 2], [1], [3, 2]], 16)}, "memory: row 3: prefix hashes"),
        ({"prefix": PrefixHashes.of([[0], [1, 0], [1], [1]], 16)}, "memory: row 1: prefix hashes"),
        ({"prefix": PrefixHashes.of([[1], [5, 5], [1], [1]], 16)}, "memory: row 1: prefix hashes"),
        ({"targets": (), "target": np.zeros(4)}, "memory: target"),
    ],
)
def test_a_column_that_breaks_its_rule_is_refused_by_row(columns, where):
    with pytest.raises(BadTrace) as refused:
        plain(**columns)
    assert refused.value.where == where


def test_names_are_distinct_and_codes_point_at_them():
    for names, codes in ((("a", "a"), [0]), (("",), [0]), (("a",), [1]), (("a",), [-2]), (("\ud800",), [0])):
        with pytest.raises(BadTrace):
            Labels(names, np.array(codes))


def test_rate_and_duration_count_the_times_between_arrivals():
    trace = plain(arrival_s=np.array([1.0, 2.0, 2.5, 4.0]))
    assert trace.duration_s == 3.0
    assert trace.rate_per_s == 1.0
    assert plain(1).rate_per_s == 0.0
    assert plain(arrival_s=np.zeros(4)).rate_per_s == 0.0


def test_a_request_with_a_target_of_its_own_answers_to_that_one_alone():
    everyone, voice, own = (Target.parse(text) for text in ("ttft:p95<=1s", "voice/tpot:p95<=50ms", "e2e:p90<=9s"))
    trace = plain(
        app=Labels.of(["voice", "chat", "voice", None]),
        targets=(everyone, voice, own),
        target=np.array([-1, -1, 2, -1]),
    )
    assert trace.rows(everyone).tolist() == [True, True, False, True]
    assert trace.rows(voice).tolist() == [True, False, False, False]
    assert trace.rows(own).tolist() == [False, False, True, False]
    assert not plain(targets=(voice,)).rows(voice).any()


def test_the_same_words_can_be_a_target_of_all_and_of_one():
    target = Target.parse("ttft:p95<=1s")
    trace = plain(targets=(target, target), target=np.array([1, -1, -1, -1]))
    assert trace.rows(target).all()
    assert trace.select(np.array([False, True, True, True])).rows(target).all()


def test_with_targets_replaces_those_by_application_and_keeps_each_request_s_own():
    own = Target.parse("e2e:p90<=9s")
    trace = plain(app=Labels.of(["voice"] * 4), targets=(TARGETS[0], own), target=np.array([-1, 1, -1, -1]))
    changed = with_targets(trace, [TARGETS[1]])
    assert changed.rows(TARGETS[1]).tolist() == [True, False, True, True]
    assert changed.rows(own).tolist() == [False, True, False, False]
    assert with_targets(changed, [TARGETS[0]]).digest() == trace.digest()
    with pytest.raises(BadTarget) as refused:
        with_targets(trace, [Target.parse("vioce/ttft:p95<=1s")])
    assert "voice" in refused.value.allowed


def test_from_pandas_names_the_column_that_is_missing_or_cannot_be():
    frame = plain(prefix=PrefixHashes.of([[1]] * 4, 16)).to_pandas()
    for broken, where in (
        (frame.drop(columns="input_tokens"), "memory: input_tokens"),
        (frame.assign(output_tokens=[1, 2, None, 4]), "memory: row 2: output_tokens"),
        (frame.assign(target="soon"), "memory: row 0: target"),
    ):
        with pytest.raises(BadTrace) as refused:
            Trace.from_pandas(broken)
        assert refused.value.where == where
    frame.attrs = {}
    with pytest.raises(BadTrace) as refused:
        Trace.from_pandas(frame)
    assert refused.value.where == "pandas: prefix_hashes"


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9))
def test_prefix_hashes_agree_exactly_as_far_as_the_prompts_do(one, other, block_size):
    a, b = prefix_hashes(one, block_size, SALT), prefix_hashes(other, block_size, SALT)
    assert len(a) == len(one) // block_size
    assert a.dtype == np.int64
    for i in range(min(len(a), len(b))):
        same = one[: (i + 1) * block_size] == other[: (i + 1) * block_size]
        assert (a[i] == b[i]) == same


def test_prefix_hashes_say_nothing_without_the_salt():
    tokens = list(range(64))
    mine, theirs = prefix_hashes(tokens, 16, SALT), prefix_hashes(tokens, 16, SALT[::-1])
    assert not set(mine.tolist()) & set(theirs.tolist())
    for salt in (b"", b"short", b"x" * 65):
        with pytest.raises(ValueError, match="salt"):
            prefix_hashes(tokens, 16, salt)
    with pytest.raises(ValueError, match="block_size"):
        prefix_hashes(tokens, 0, SALT)


def test_hashed_prompts_make_a_valid_trace():
    prompts = [[1] * 40, [1] * 33 + [2] * 7, [1] * 40, [3] * 40]
    trace = plain(prefix=PrefixHashes.of([prefix_hashes(prompt, 16, SALT) for prompt in prompts], 16))
    assert trace.prefix.counts.tolist() == [2, 2, 2, 2]
    assert trace.prefix.row(0).tolist() == trace.prefix.row(1).tolist() == trace.prefix.row(2).tolist()


@pytest.mark.parametrize(("of_trace", "of_engine", "blocks"), [(512, 16, 32), (16, 16, 1), (48, 16, 3)])
def test_one_trace_block_covers_whole_engine_blocks(of_trace, of_engine, blocks):
    assert blocks_per_hash(of_trace, of_engine) == blocks


@pytest.mark.parametrize(("of_trace", "of_engine"), [(16, 32), (512, 48), (16, 0), (16, -16)])
def test_block_sizes_that_do_not_divide_are_refused(of_trace, of_engine):
    with pytest.raises(BadTrace) as refused:
        blocks_per_hash(of_trace, of_engine)
    assert refused.value.where == "block size"


@settings(max_examples=40)
@given(traces(), st.floats(0.1, 10), st.floats(0.01, 3), st.floats(0.01, 3), st.none() | st.integers(2, 60))
def test_scaling_keeps_every_request_in_order_within_its_limits(trace, rate, input_length, output_length, most):
    lengths = np.array([trace.input_tokens.max() * input_length, trace.output_tokens.max() * output_length])
    if lengths.max() > 2**31 - 2:
        with pytest.raises(BadTrace):
            scale(trace, rate=rate, input_length=input_length, output_length=output_length)
        return
    out = scale(trace, rate=rate, input_length=input_length, output_length=output_length, max_tokens=most)
    assert len(out) == len(trace)
    assert out.duration_s == pytest.approx(trace.duration_s / rate)
    total = out.input_tokens.astype(np.int64) + out.output_tokens
    if most is None:
        np.testing.assert_array_equal(out.input_tokens, np.maximum(np.rint(trace.input_tokens * input_length), 1))
        np.testing.assert_array_equal(out.output_tokens, np.maximum(np.rint(trace.output_tokens * output_length), 1))
    else:
        assert total.max() <= most
    if trace.prefix is not None:
        whole = np.minimum(out.input_tokens, trace.input_tokens) // 16
        expected = np.where(
            out.input_tokens == trace.input_tokens, trace.prefix.counts, np.minimum(trace.prefix.counts, whole)
        )
        # clipping twice (by the factor, then by max_tokens) may also come back to the old length with fewer hashes
        assert (out.prefix.counts <= expected).all()
        assert most is not None or (out.prefix.counts == expected).all()
        for i in range(len(out)):
            np.testing.assert_array_equal(out.prefix.row(i), trace.prefix.row(i)[: out.prefix.counts[i]])
    np.testing.assert_array_equal(out.rows(TARGETS[0]), trace.rows(TARGETS[0]))


def test_scaling_by_one_changes_nothing():
    trace = plain(prefix=PrefixHashes.of([[1, 2, 3]] * 4, 16))
    assert scale(trace).digest() == trace.digest()
    assert scale(trace).notes == ()


def test_clipping_shortens_in_proportion_and_is_counted():
    trace = plain(input_tokens=np.array([90, 9, 1, 50]), output_tokens=np.array([30, 1, 200, 50]))
    out = scale(trace, rate=2, max_tokens=100)
    assert out.input_tokens.tolist() == [75, 9, 1, 50]
    assert out.output_tokens.tolist() == [25, 1, 99, 50]
    assert out.notes == ("arrival rate times 2", "2 of 4 requests shortened to 100 tokens")


@settings(max_examples=40)
@given(traces(), st.floats(0.01, 1), st.integers(0, 99))
def test_a_sample_draws_requests_of_the_trace_at_their_own_times_and_the_seed_decides_which(trace, fraction, seed):
    out = draw(trace, fraction=fraction, seed=seed)
    assert len(out) == max(1, round(fraction * len(trace)))
    assert out.digest() == draw(trace, n=len(out), seed=seed).digest()
    requests = list(zip(trace.arrival_s, trace.input_tokens, trace.output_tokens))
    for request in zip(out.arrival_s, out.input_tokens, out.output_tokens):
        requests.remove(request)
    assert len(requests) == len(trace) - len(out)
    assert out.notes[-1].startswith(f"{len(out)} of {len(trace)} requests drawn")


def test_another_seed_draws_other_requests():
    trace = plain(200, input_tokens=np.arange(1, 201))
    assert len({draw(trace, n=50, seed=seed).digest() for seed in range(5)}) == 5
    assert draw(trace, fraction=0.25).rate_per_s == pytest.approx(trace.rate_per_s / 4, rel=0.1)


@settings(max_examples=40)
@given(traces(), st.floats(0.1, 100))
def test_windows_side_by_side_hold_every_request_once(trace, width_s):
    edges = np.linspace(0, trace.arrival_s[-1] + width_s, 5)
    found = 0
    for start_s, end_s in pairwise(edges):
        if ((trace.arrival_s >= start_s) & (trace.arrival_s < end_s)).any():
            part = window(trace, start_s, end_s)
            found += len(part)
            assert part.arrival_s[-1] < end_s - start_s + 1e-6
    assert found == len(trace)


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda t: draw(t), "sample"),
        (lambda t: draw(t, n=1, fraction=0.5), "sample"),
        (lambda t: draw(t, n=5), "sample: n"),
        (lambda t: draw(t, n=0), "sample: n"),
        (lambda t: draw(t, fraction=0.0), "sample: fraction"),
        (lambda t: draw(t, fraction=1.01), "sample: fraction"),
        (lambda t: draw(t, fraction=float("nan")), "sample: fraction"),
        (lambda t: scale(t, rate=0), "scale: rate"),
        (lambda t: scale(t, rate=float("nan")), "scale: rate"),
        (lambda t: scale(t, input_length=-1), "scale: input_length"),
        (lambda t: scale(t, output_length=float("inf")), "scale: output_length"),
        (lambda t: scale(t, input_length=1e9), "scale"),
        (lambda t: scale(t, max_tokens=1), "max_tokens"),
        (lambda t: window(t, 100, 200), "window"),
        (lambda t: window(t, 3, 1), "window"),
    ],
)
def test_a_transformation_that_cannot_be_is_refused_by_its_argument(call, where):
    with pytest.raises(BadTrace) as refused:
        call(plain())
    assert refused.value.where == where


def test_the_front_door_loads_neither_pandas_nor_pyarrow():
    code = "import sys, paretune.traces as t; t.read(t.sample_path()); print([m for m in sys.modules if m in %r])"
    heavy = ("pandas", "pyarrow", "torch", "numba", "optuna", "matplotlib")
    out = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
