"""The page of a comparison: every number recomputed from the logs, nothing fetched, nothing injected, accessible."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_efficient.comparison import compare
from lightning_efficient.comparison.html import to_html
from lightning_efficient.comparison.pictures import front

VARIANTS = {"baseline": 0.0, "sigma": 0.04, "slow <b>&\"'": -0.002}
COSTS = {
    "efficient/run_cost/step_ms": "ms per step, median",
    "efficient/run_cost/peak_memory_mib": "peak memory, MiB",
    "efficient/run_cost/parameters": "parameters",
    "efficient/export/latency_ms_batch_1": "exported: latency, ms, batch 1",
}
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*\.?\d*(?:e[+-]\d+)?")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    rng = np.random.default_rng(0)
    for index, (variant, gain) in enumerate(VARIANTS.items()):
        for seed in range(4):
            folder = root / (f"v{index}" if index == 2 else variant) / f"seed_{seed}"
            with SummaryWriter(str(folder)) as writer:
                for step in (10, 20, 30):
                    acc = 0.8 + 0.01 * seed + gain + 0.001 * step + rng.normal(0, 0.003)
                    writer.add_scalar("val_acc", acc, step)
                    writer.add_scalar("val_loss", 1 - acc + rng.normal(0, 0.01), step)
                    writer.add_scalar("efficient/run_cost/step_ms", 50 + 5 * index + rng.normal(), step)
                    writer.add_scalar("efficient/run_cost/peak_memory_mib", 2000 + 10 * index + seed + step, step)
                    writer.add_scalar("efficient/run_cost/parameters", 199_000 + index, step)
                writer.add_scalar("efficient/export/latency_ms_batch_1", 2.0 - index / 10 + rng.normal(0, 0.02), 30)
    return root


class Page(HTMLParser):
    """Text by place: tables by caption, cells by row; classes and tags met; text outside."""

    VOID = ("meta", "line", "path", "use", "br", "link", "img", "stop", "rect")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.verdicts: list[str] = []
        self.facts: list[str] = []
        self.rest: list[str] = []
        self._table: list[list[str]] = []
        self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append((tag, dict(attrs)))
        if tag == "table":
            self._table, self._caption = [], dict(attrs).get("id") or ""
        if tag == "tr":
            self._table.append([])
        if tag in ("th", "td"):
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.stack.pop()[0] == tag
        if tag == "table":
            self.tables[self._caption] = self._table

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.stack]
        classes = [attrs.get("class") for _, attrs in self.stack]
        if not data.strip() or {"script", "style", "svg"} & set(inside):
            return
        if "caption" in inside:
            self._caption += data if "soft" not in classes else ""
        elif "td" in inside or "th" in inside:
            self._table[-1][-1] += data
        elif "verdict" in classes:
            self.verdicts.append(data)
        elif "facts" in classes:
            self.facts.append(data)
        else:
            self.rest.append(data.strip())


@pytest.fixture(scope="module")
def text(logs: Path) -> str:
    found = compare(logs)
    # a hostile name, as the name of a folder could be on some systems
    hostile = [
        type(run)(run.path, run.variant.replace("v2", list(VARIANTS)[2]), run.replica, run.series) for run in found.runs
    ]
    return to_html(type(found)(hostile, found.metrics, "baseline", found.better))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def truth(logs: Path) -> dict[str, dict[str, list[float]]]:
    """Quantity → variant → a value a seed, straight from the event files."""
    found: dict[str, dict[str, list[float]]] = {}
    for index, variant in enumerate(VARIANTS):
        for seed in range(4):
            log = EventAccumulator(str(logs / (f"v{index}" if index == 2 else variant) / f"seed_{seed}"))
            log.Reload()
            series = {tag: np.array([e.value for e in log.Scalars(tag)]) for tag in log.Tags()["scalars"]}
            values = {
                "val_acc, final": series["val_acc"][-1],
                "val_acc, best (max)": series["val_acc"].max(),
                "val_loss, final": series["val_loss"][-1],
                "val_loss, best (min)": series["val_loss"].min(),
                "last logged step": 30.0,
                COSTS["efficient/run_cost/step_ms"]: np.median(series["efficient/run_cost/step_ms"]),
                COSTS["efficient/run_cost/peak_memory_mib"]: series["efficient/run_cost/peak_memory_mib"].max(),
                COSTS["efficient/run_cost/parameters"]: series["efficient/run_cost/parameters"].max(),
                COSTS["efficient/export/latency_ms_batch_1"]: series["efficient/export/latency_ms_batch_1"][-1],
            }
            for name, value in values.items():
                found.setdefault(name, {}).setdefault(variant, []).append(float(value))
    return found


def same(shown: str, expected: list[float]) -> None:
    """Numbers in a text are the expected ones, to half a unit of the last digit shown."""
    numbers = NUMBER.findall(shown)
    assert len(numbers) == len(expected), (shown, expected)
    for number, value in zip(numbers, expected, strict=True):
        digits = number.replace(",", "").lower()
        mantissa, _, power = digits.partition("e")
        unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(digits) - value) <= 0.5001 * unit, (shown, value)


def mean_and_half(values: list[float]) -> list[float]:
    if np.ptp(values) == 0:
        return [values[0], 0.0]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return [float(np.mean(values)), (interval.high - interval.low) / 2]


def difference(quantity: str, before: list[float], after: list[float]) -> list[float]:
    ratio = quantity in COSTS.values()
    a, b = (np.log(before), np.log(after)) if ratio else (np.array(before), np.array(after))
    if np.ptp(b - a) < 1e-12:
        return [float(np.exp(np.mean(b - a)))] if ratio else [float(np.mean(b - a)), 0.0]
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    if ratio:
        return [float(np.exp(x)) for x in (np.mean(b - a), interval.low, interval.high)]
    return [float(np.mean(b - a)), (interval.high - interval.low) / 2]


def test_every_number_in_the_tables(page: Page, truth: dict[str, dict[str, list[float]]]) -> None:
    quantities = {name.strip(): rows for name, rows in page.tables.items() if name != "runs"}
    assert quantities.keys() == truth.keys()
    for quantity, (head, *rows) in quantities.items():
        assert head == ["variant", "runs", "mean ± 95 %", "to baseline"]
        assert [row[0] for row in rows] == list(VARIANTS)
        for variant, count, mean, to_baseline in rows:
            assert count == "4"
            same(mean, mean_and_half(truth[quantity][variant]))
            if variant == "baseline":
                assert to_baseline == "–"
            else:
                same(to_baseline, difference(quantity, truth[quantity]["baseline"], truth[quantity][variant]))


def test_every_number_of_every_run(page: Page, truth: dict[str, dict[str, list[float]]]) -> None:
    (_, *quantities), *rows = page.tables["runs"]
    assert set(quantities) == truth.keys()
    assert len(rows) == 12
    for name, *values in rows:
        variant, _, seed = name.rpartition("/seed_")
        for quantity, value in zip(quantities, values, strict=True):
            same(value, [truth[quantity][variant][int(seed)]])


def test_every_number_in_the_verdicts(page: Page, truth: dict[str, dict[str, list[float]]]) -> None:
    others = list(VARIANTS)[1:]
    values = truth["val_acc, final"]
    p = [stats.ttest_rel(values[v], values["baseline"]).pvalue for v in others]
    assert (min(p) * 2 < 0.05, max(p) < 0.05) == (True, False)  # Holm, two comparisons
    said, costs = page.verdicts[::2], page.verdicts[1::2]
    assert [t.split(" with")[0] for t in said] == ["Better than baseline", "No evidence of a difference"]
    for verdict, variant in zip(said, others, strict=True):
        same(verdict, [4, *difference("val_acc, final", values["baseline"], values[variant])])
    for cost, variant in zip(costs, others, strict=True):
        for shown, name in re.findall(r"([\d.]+) × the (latency|size|time a step)", cost):
            quantity = next(q for q in truth if {"time a step": "ms per step"}.get(name, name) in q)
            ratio = difference(quantity, truth[quantity]["baseline"], truth[quantity][variant])[0]
            assert float(shown) == pytest.approx(ratio, abs=5e-3)
    facts = [fact.rpartition(": ") for fact in page.facts]
    assert len(facts) == 6
    for (quantity, _, shown), variant in zip(facts, [v for v in others for _ in range(3)], strict=True):
        same(shown, difference(quantity, truth[quantity]["baseline"], truth[quantity][variant]))


def test_numbers_elsewhere_are_counts_and_words(page: Page) -> None:
    found = [(number, text) for text in page.rest for number in NUMBER.findall(text)]
    counts = {"3": "3 variants, 12 runs", "12": "3 variants, 12 runs", "4": "4 runs", "2": "2 comparisons"}
    for number, text in found:
        assert counts.get(number, "95 %" if number == "95" else "3 seeds") in text or "3 seeds" in text


def test_the_data_in_the_page(text: str, truth: dict[str, dict[str, list[float]]], logs: Path) -> None:
    data = json.loads(re.search(r'<script type="application/json" id="comparison">(.*?)</script>', text, re.DOTALL)[1])
    for row in data["rows"]:
        assert row["values"] == pytest.approx(truth[row["quantity"]][row["variant"]])
    assert str(logs) not in text  # no path of this machine


def test_nothing_is_fetched_and_nothing_is_injected(page: Page, text: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "b", "object", "base")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "data")
            assert "href" not in name or (value or "").startswith("#"), (tag, value)
            assert not name.startswith("on")
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "comparison"}
    ]
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?:|url\((?!#)|@import", outside)


def test_what_a_phone_a_dark_room_and_a_screen_reader_need(page: Page, text: str) -> None:
    tags = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        a for t, a in page.tags if t == "meta"
    ]
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media (max-width:" in text
    assert tags.count("h1") == 1
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    for _, attributes in page.tags:
        if attributes.get("class") == "scroll":
            assert (attributes["tabindex"], attributes["role"]) == ("0", "region")
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "#000000" not in svgs  # text and axes in the page's colour
    assert "DejaVu" not in svgs


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme: str, text: str) -> None:
    """WCAG contrast of at least 4.5 for text on its background, in both themes."""
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-fA-F]{6})", light))
    if theme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-fA-F]{6})", dark))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    pairs = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("accent", "card")]
    for text_colour, ground in [*pairs, ("good", "good-bg"), ("bad", "bad-bg"), ("flat", "flat-bg")]:
        assert contrast(text_colour, ground) >= 4.5, (text_colour, ground)
    for index in range(6):
        assert contrast(f"c{index}", "card") >= 2.0


def test_pages_without_a_baseline_costs_or_curves_to_speak_of(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "a")) as writer:
        writer.add_scalar("score", math.nan, 1)
    found = Page(to_html(compare(tmp_path, ["score"])))
    assert found.verdicts == []
    assert found.tables["score, final"][1] == ["a", "1 seed: no interval", "nan in 1 of 1"]


def test_the_front() -> None:
    points = [(1.0, 0.8), (2.0, 0.9), (2.0, 0.85), (3.0, 0.7), (4.0, 0.95)]
    assert front(points, "max") == [(1.0, 0.8), (2.0, 0.9), (4.0, 0.95)]
    assert front(points, "min") == [(1.0, 0.8), (3.0, 0.7)]
