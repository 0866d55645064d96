"""The report: what its sentences say, what its page holds, and that the page trusts nobody."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretune.optimizer.finalists import Correction
from paretune.optimizer.front import Evaluation, pareto
from paretune.optimizer.study import Screened, Study
from paretune.reports import comparison, page, plots, summary
from paretune.reports.chart import chart
from paretune.reports.report_data import Measured, ReportData, TileGain
from paretune.reports.tables import as_text
from paretune.runtime.spec import Deployment
from paretune.traces.columns import Labels
from paretune.traces.describe import statistics
from paretune.traces.metrics import Metric, Summary, Target
from paretune.traces.trace import Trace

TTF30 = Metric("ttf", 30)
HOSTILE = "<script>alert(1)</script>\"'&--></style>{{ 7*7 }}"
VOID = {"meta", "link", "br", "hr", "img", "input"}


def sample_statistics(source: str = "azure_conv_sample.csv") -> Any:
    rng = np.random.default_rng(0)
    n = 1200
    trace = Trace(
        arrival_s=np.sort(rng.uniform(0, 600, n)),
        input_tokens=rng.integers(1, 2000, n),
        output_tokens=rng.integers(1, 500, n),
        app=Labels.of("voice" if i % 4 else "search" for i in range(n)),
        source=source,
        notes=("scaled: lengths × 0.1",),
    )
    return statistics(trace)


def run(ttf30_s: float, tokens_per_s: float = 900.0) -> Summary:
    shares = {"mean": 0.6, "p50": 0.5, "p90": 0.9, "p95": 1.0, "p99": 1.4}
    scales = {"ttft": 0.4, "ttft_from_send": 0.4, "ttf30": 1.0, "tpot": 0.02, "e2e": 4.0}
    values = {m: {p: ttf30_s * scale * share for p, share in shares.items()} for m, scale in scales.items()}
    return Summary(1200, 1200, 0.1, 3, 610.0, tokens_per_s, values)


def evaluation(trial: int, ttf30_s: float, usd: float, **changes: Any) -> Evaluation:
    pool = {"max_num_seqs": 8 + trial, "num_threads": 1 + trial % 2, "weight_dtype": ("int8", "bf16")[trial % 2]}
    known: dict[str, Any] = {
        "deployment": Deployment().with_pool(**pool) if trial else Deployment(),
        "fidelity": "simulated",
        "feasible": True,
        "reason": "",
        "summary": run(ttf30_s),
        "usd_per_hour": 0.0425,
        "usd_per_million_tokens": usd,
        "capacity_rate": 1 / usd,
        "replicas_needed": 1,
        "intervals": {
            "ttf30:p95": (ttf30_s * 0.85, ttf30_s * 1.2),
            "e2e:p50": (ttf30_s * 1.8, ttf30_s * 2.2),
            "usd_per_million_tokens": (usd * 0.9, usd * 1.1),
        },
        "trial": trial,
    }
    return Evaluation(**(known | changes))


def sample_data(trials: int = 60, all_on_front: bool = False, **changes: Any) -> ReportData:
    rng = np.random.default_rng(1)
    default = evaluation(0, 0.92, 0.88)
    each = [default]
    for trial in range(1, trials):
        wait_s = 0.15 * math.exp(2.2 * trial / trials)
        noise = 0 if all_on_front else abs(rng.normal(0, 0.5))
        late = wait_s > 1.1 and not all_on_front
        reason = "ttf30:p95<=600ms: 1.2 s" if late else ""
        each.append(evaluation(trial, wait_s, 0.12 / wait_s * math.exp(noise), feasible=not late, reason=reason))
    front = pareto(each, TTF30, 95, "capacity")
    chosen = front.points[len(front.points) // 3]
    known: dict[str, Any] = {
        "study": "azure-conv",
        "created_at": "2026-11-23T08:00:00Z",
        "statistics": sample_statistics(),
        "front": front,
        "chosen": chosen,
        "default": default,
        "targets": (Target.parse("ttf30:p95<=600ms"),),
        "profile": "profile of a 2-core machine",
        "profile_measured": True,
        "prices": "price book of cloud lists",
        "prices_as_of": "2026-11-01",
        "not_modeled": ("Other programs on the machine.",),
        "chosen_measured": Measured(run(chosen.value(TTF30, 95) * 1.04)),
        "default_measured": Measured(run(1.2), usd_per_million_tokens=0.93),
        "tile_gains": (TileGain("linear", "int8", 8, 42e-6, 31e-6, "cpp row_tile=4"),),
        "commands": ("paretune tune azure_conv_sample.csv", "paretune pick azure-conv --slo 'ttf30:p95<=600ms'"),
        "provenance": (("trace digest", "a1" * 32), ("seed", "0")),
    }
    return ReportData(**(known | changes))


class Outline(HTMLParser):
    """Start tags with attributes, text outside style and script; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.tags if "id" in attrs]


# What the sentences say.


def test_headline_names_the_change_its_price_with_a_range_and_what_people_feel() -> None:
    default = evaluation(0, 0.92, 0.88)
    pick = evaluation(3, 0.40, 0.44)
    data = sample_data(front=pareto([default, pick], TTF30, 95, "capacity"), chosen=pick, default=default)
    assert summary.headline(data) == (
        "The pick lowers the price of a million tokens from $0.88 to $0.44 (likely $0.396 to $0.484), and 95 of 100 "
        "requests wait at most 400 ms for the first 30 tokens of the answer (about 22 words) instead of 920 ms."
    )


def test_sizing_speaks_of_the_monthly_bill() -> None:
    default = evaluation(0, 0.92, 0.88, usd_per_hour=42.74)
    pick = evaluation(3, 0.92, 0.44, usd_per_hour=25.2, intervals={"usd_per_hour": (24.0, 30.0)})
    data = sample_data(front=pareto([default, pick], TTF30, 95, "sizing"), chosen=pick, default=default)
    sentence = summary.headline(data)
    assert "lowers the monthly bill from $31,200 to $18,400 (likely $17,500 to $21,900)" in sentence
    assert "instead of" not in sentence, "nobody waits differently"
    assert "Dollars a month" in page.html(data)


def test_a_dearer_pick_is_said_to_be_dearer() -> None:
    default, pick = evaluation(0, 0.92, 0.44), evaluation(3, 0.40, 0.88)
    data = sample_data(front=pareto([default, pick], TTF30, 95, "capacity"), chosen=pick, default=default)
    assert "raises the price of a million tokens from $0.44 to $0.88" in summary.headline(data)


def test_a_default_that_serves_nothing_in_time_is_said_to() -> None:
    default = evaluation(0, 0.92, math.inf, capacity_rate=0.0, feasible=False, intervals={})
    data = sample_data(default=default)
    assert "default cannot keep the target at any load" in summary.headline(data)
    assert "inf" not in Outline(page.html(data)).text


def test_picking_the_default_changes_nothing() -> None:
    default = evaluation(0, 0.92, 0.88)
    data = sample_data(front=pareto([default], TTF30, 95, "capacity"), chosen=default, default=default)
    assert "already the best choice" in summary.headline(data)
    assert "Nothing: the pick is what would run anyway." in page.html(data)


def test_a_prediction_stays_the_prediction_where_the_pick_was_also_measured() -> None:
    each = evaluation(3, 0.40, 0.44, fidelity="measured", measured=run(0.55), correction={"ttf30": 1.25})
    rows = {row.name: row for row in comparison.comparisons("pick", each, Measured(run(0.47)))}
    row = rows["TTF-30 p95"]
    assert row.predicted == pytest.approx(0.40 * 1.25)
    assert (row.low, row.high, row.measured) == pytest.approx((0.34, 0.48, 0.47))
    assert row.inside is True
    assert rows["TTFT p50"].inside is None, "no interval was worked out for it"


def test_final_table_has_every_metric_for_pick_and_default() -> None:
    table = comparison.final_table(comparison.compared(sample_data()))
    latencies = [f"{metric} {p}" for metric in ("TTFT", "TTF-30", "TPOT", "E2E") for p in ("p50", "p95")]
    names = [*latencies, "$ per million tokens", "$ a month"]
    assert [row[0] for row in table.rows] == [f"{who}: {name}" for who in ("pick", "default") for name in names]
    assert table.rows[13] == ("default: TTF-30 p95", "920 ms", "782 ms to 1.10 s", "1.20 s", "no")
    assert max(len(line) for line in as_text(table).splitlines()) < 80


def test_confidence_counts_what_lies_inside() -> None:
    rows = [row.inside for row in comparison.compared(sample_data()) if row.inside is not None]
    assert any(f"{sum(rows)} lie inside" in sentence for sentence in summary.confidence(sample_data()))
    assert any("not measured" in text for text in summary.confidence(sample_data(profile_measured=False)))


def test_what_was_not_tested_names_precision_and_missing_replay() -> None:
    data = sample_data(chosen=evaluation(2, 0.4, 0.44), chosen_measured=None)
    said = " ".join(summary.not_tested(data))
    assert "int8 are as good as in bf16" in said
    assert "not been replayed" in said


def test_unfinished_requests_are_said() -> None:
    lossy = Measured(dataclasses.replace(run(0.5), finished=1190))
    assert any("10 requests did not finish" in text for text in summary.not_tested(sample_data(chosen_measured=lossy)))


def test_the_options_share_a_point_where_there_is_one() -> None:
    front = pareto([evaluation(1, 0.4, 0.4)], TTF30, 95, "capacity")
    assert [(option.name, option.number) for option in summary.options(front)] == [
        ("cheapest and balanced and fastest", 1)
    ]


def test_a_study_says_how_it_searched() -> None:
    default, pick = evaluation(0, 0.92, 0.88), evaluation(3, 0.40, 0.44)
    study = Study(
        name="nightly",
        seed=7,
        targets=(Target.parse("ttf30:p95<=600ms"),),
        front=pareto([default, pick], TTF30, 95, "capacity"),
        default=default,
        finalists=(),
        corrections=(Correction("tpot", 1.12, 0.03, 5),),
        screened=Screened(20736, {"too large": 736}, {"slower than the target": 19500}, simulated=500, measured=5),
        sampler="tpe",
        measured_steps=False,
        relative_error=0.1,
        not_modeled=("Swapping.",),
        price=None,
        complete=False,
    )
    search = summary.search_words(study)
    data = sample_data(front=study.front, chosen=pick, default=default, search=search, profile_measured=False)
    said = " ".join(summary.confidence(data))
    assert "Of 20,736 points of the search space 736 are no valid deployment and 19,500 were left out" in said
    assert "measured values were 1.12 times the simulated ones" in said
    assert "ended before it was done" in said
    assert "Step times are not measured" in said
    assert "had to hold: ttf30:p95&lt;=600ms" in page.html(data)


def test_the_load_of_a_point_is_shown_where_it_is_not_the_recorded_one() -> None:
    points = [evaluation(3, 0.2, 0.8, load=0.5), evaluation(3, 0.4, 0.4, load=2.0)]
    data = sample_data(front=pareto(points, TTF30, 95, "capacity"), chosen=points[1], targets=())
    text = page.html(data)
    assert "at 0.500 × the recorded rate" in text
    assert text.count('class="chosen"') == 1


def test_a_candidate_known_twice_is_drawn_once() -> None:
    default, cheap = evaluation(0, 0.92, 0.88), evaluation(2, 0.5, 0.3)
    simulated = evaluation(1, 0.6, 0.5)
    measured = dataclasses.replace(simulated, fidelity="measured", measured=run(0.7))
    front = pareto([default, cheap, simulated, measured], TTF30, 95, "capacity")
    marks = chart(sample_data(front=front, chosen=cheap, default=default)).others
    assert [(mark.kind, mark.x) for mark in marks] == [("measured", pytest.approx(0.7))]


# What the page holds.


def test_the_page_parses_and_its_ids_are_unique() -> None:
    outline = Outline(page.html(sample_data()))
    assert len(outline.ids()) == len(set(outline.ids()))
    links = [attrs["href"] for tag, attrs in outline.tags if tag in ("a", "use")]
    assert links
    assert all(link and link.startswith("#") and link[1:] in outline.ids() for link in links)


def test_every_front_point_is_a_labeled_link() -> None:
    data = sample_data()
    outline = Outline(page.html(data))
    labels = {
        attrs["href"]: attrs["aria-label"] or "" for tag, attrs in outline.tags if tag == "a" and "aria-label" in attrs
    }
    assert len(data.front.points) > 5
    assert set(labels) == {f"#option={i}" for i in range(1, len(data.front.points) + 1)}
    assert all("per million tokens" in label for label in labels.values())


def test_the_first_screen_explains_itself_without_percentile_jargon() -> None:
    text = page.html(sample_data())
    first = re.sub(r"<[^>]*>", " ", text[text.index("<body>") : text.index('id="choices"')])
    assert not re.search(r"\bp\d\d\b|SLO|TTFT|TTF-", first)


def test_nothing_comes_from_elsewhere() -> None:
    text = page.html(sample_data())
    policy = next(attrs["content"] for _, attrs in Outline(text).tags if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not re.search(r"https?:|url\(|@import|\bsrc=", text.replace("http-equiv", ""))
    assert not re.search(r'\sstyle="|\son\w+="', text), "the policy would block it"


def test_hostile_names_stay_text() -> None:
    hostile = evaluation(2, 0.4, 0.44, reason=HOSTILE)
    hostile = dataclasses.replace(hostile, deployment=hostile.deployment.model_copy(update={"model": HOSTILE}))
    data = sample_data(
        study=HOSTILE,
        statistics=sample_statistics(HOSTILE),
        chosen=hostile,
        not_modeled=(HOSTILE,),
        commands=(HOSTILE,),
        provenance=((HOSTILE, HOSTILE),),
        prices=HOSTILE,
        profile=HOSTILE,
    )
    text = page.html(data)
    outline = Outline(text)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert "<script>alert" not in text
    assert sum(HOSTILE in part for part in outline.text) >= 8


def test_500_points_stay_below_300_kilobytes() -> None:
    assert len(page.html(sample_data(500)).encode()) < 300_000
    data = sample_data(500, all_on_front=True)
    assert len(data.front.points) > 450
    assert len(page.html(data).encode()) < 900_000


def test_a_page_without_optional_parts_is_whole() -> None:
    data = sample_data(
        targets=(),
        not_modeled=(),
        chosen_measured=None,
        default_measured=None,
        tile_gains=(),
        commands=(),
        provenance=(),
    )
    text = page.html(data)
    Outline(text)
    assert "has not been replayed" in text
    assert 'class="late" d="M' not in text.split("legend")[0], "no target, no shade"


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    page.write_report(sample_data(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", _disk_full)
    with pytest.raises(OSError, match="No space"):
        page.write_report(sample_data(study="another"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _disk_full(handle: int) -> None:
    raise OSError(28, "No space left on device")


def test_the_same_data_give_the_same_bytes() -> None:
    assert page.html(sample_data()) == page.html(sample_data())


# Geometry and plots.


def test_the_band_holds_the_front() -> None:
    picture = chart(sample_data())
    highest = {x: max(y for bx, y in picture.band if bx >= x * 0.999) for x, _ in picture.front}
    assert all(highest[x] >= y for x, y in picture.front)
    assert min(y for _, y in picture.band) < min(y for _, y in picture.front)
    assert picture.line[0] == min(picture.front)


def test_without_intervals_there_is_no_band() -> None:
    data = sample_data()
    bare = pareto([dataclasses.replace(each, intervals={}) for each in data.front.evaluations], TTF30, 95, "capacity")
    assert chart(sample_data(front=bare)).band == ()


def test_only_a_target_on_the_same_axis_is_drawn() -> None:
    others = tuple(map(Target.parse, ("ttf30:p50<=600ms", "ttft:p95<=600ms", "voice/ttf30:p95<=600ms")))
    assert chart(sample_data(targets=others)).limit_s is None
    both = tuple(map(Target.parse, ("ttf30:p95<=600ms", "ttf30:p95<=400ms")))
    assert chart(sample_data(targets=both)).limit_s == 0.4


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    curve, scatter = tmp_path / f"curve{suffix}", tmp_path / f"scatter{suffix}"
    plots.write_curve(sample_data(), curve)
    plots.write_predicted_measured(comparison.compared(sample_data()), scatter)
    magic = {".png": b"\x89PNG\r\n", ".svg": b"<?xml"}[suffix]
    assert all(path.read_bytes().startswith(magic) for path in (curve, scatter))
    before = curve.read_bytes()
    plots.write_curve(sample_data(), curve)
    assert curve.read_bytes() == before, "same data, same bytes"
    monkeypatch.setattr(os, "fsync", _disk_full)
    with pytest.raises(OSError, match="No space"):
        plots.write_curve(sample_data(study="another"), curve)
    assert curve.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([curve, scatter])


def test_a_plot_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(plots.BadPlot, match=r"\.png or \.svg"):
        plots.write_curve(sample_data(), tmp_path / "curve.bmp")
    assert not list(tmp_path.iterdir())


# In a real browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        how = "no chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(how)
        pytest.skip(how)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


def _open(browser: Any, path: Path, fragment: str = "") -> list[str]:
    """Load a page; the addresses it requested."""
    import json

    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri() + fragment)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_alone_and_without_a_complaint(browser: Any, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "report.html"
    page.write_report(sample_data(), path)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    requested = _open(browser, path)
    assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]
    assert browser.get_log("browser") == []
    paper, ink = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    lightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink)]
    assert (lightness[0] < lightness[1]) == (scheme == "dark")
    assert min(lightness) < 150 < 600 < max(lightness), "readable"


def test_points_are_reached_and_read_by_keyboard(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    path, data = tmp_path / "report.html", sample_data()
    page.write_report(data, path)
    _open(browser, path)
    labels = []
    for _ in range(len(data.front.points) + 1):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        labels.append(browser.execute_script("return document.activeElement.getAttribute('aria-label')"))
    assert labels[0] is None, "the first stop skips the curve"
    assert [label.partition(":")[0] for label in labels[1:]] == [f"Option {i + 1}" for i in range(len(labels) - 1)]
    title = "return document.querySelector('#panel h3').textContent"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script(title) == f"Option {len(data.front.points)}"
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert browser.execute_script(title) == f"Option {len(data.front.points) - 1}"
    assert browser.execute_script("return location.hash") == f"#option={len(data.front.points) - 1}"


def test_a_link_to_an_option_opens_it(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page.write_report(sample_data(), path)
    _open(browser, path, "#option=2")
    assert browser.execute_script("return document.querySelector('#panel h3').textContent") == "Option 2"
    assert browser.execute_script("return document.querySelector('.curve [aria-current]').getAttribute('href')") == (
        "#option=2"
    )


def test_csv_of_trials_runs_no_formula(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    data = sample_data()
    bad = dataclasses.replace(data.front.evaluations[5], feasible=False, reason='=cmd|"calc"!A1')
    front = dataclasses.replace(data.front, evaluations=(*data.front.evaluations, bad))
    page.write_report(sample_data(front=front), path)
    _open(browser, path)
    text = browser.execute_async_script(
        """const done = arguments[0];
        URL.createObjectURL = (blob) => { blob.text().then(done); return "#"; };
        document.querySelectorAll("details").forEach((part) => { part.open = true; });
        document.getElementById("save-trials").click();"""
    )
    lines = text.splitlines()
    assert len(lines) == len(front.evaluations) + 1
    assert '"\'=cmd|""calc""!A1"' in lines[-1]
