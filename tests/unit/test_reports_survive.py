"""Reports survive their users: any name and number in every table, picture and page, any file among the logs."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text as Drawn
from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_efficient.ablation.run import _not_compared
from lightning_efficient.ablation.view import RunRow, errors
from lightning_efficient.ablation.view import table as runs_table
from lightning_efficient.cli import main
from lightning_efficient.common.escaping import picture_text, printable, printable_lines, rich_text, write_whole
from lightning_efficient.comparison import compare
from lightning_efficient.comparison.comparison import Comparison
from lightning_efficient.comparison.curves import single, title_of
from lightning_efficient.comparison.estimate import Difference
from lightning_efficient.comparison.html import to_html
from lightning_efficient.comparison.logs import Run, Series, read_runs
from lightning_efficient.comparison.pictures import differences, pareto, png
from lightning_efficient.comparison.verdict import gain_of
from lightning_efficient.metrics.heatmap import heatmap

NAMES: dict[str, str] = {
    "brackets": "val_rate [/s]", "closing tag": "[/]", "style": "[bold red]val[/bold red]", "link": "[link=x]a[/link]",
    "dollar": "val_$cost", "dollars": "val $x_1^{$ loss", "odd dollars": "$$$", "math": r"$\frac{$",
    "percent": "val_%d 100%",
    "underscore": "_hidden loss", "caret": "a^b_c~d", "backslash": "val\\", "backslash dollar": "a\\$b",
    "quote": "'\"`<>&",
    "script": "</script><script>alert(1)</script>", "html": "<b>val</b>&amp;",
    "escape code": "\x1b[31mval\x1b[0m\x1b]0;t\x07",
    "carriage return": "val\rgone", "newlines": "val\nloss\n\n", "tab": "val\tloss", "nul": "val\x00loss",
    "right to left": "val\u202egnp.exe", "zero width": "v\u200bal", "surrogate": "val\udcff", "emoji": "val 🦙 loss",
    "cjk": "验证损失", "combining": "a" + "\u0301" * 50, "long": "val_" + "x" * 5000, "spaces": "   ",
    "percent s": "%s%n{0}{}",
    "colon": "val:min", "slashes": "a//b///c",
}  # fmt: skip
VALUES: dict[str, list[float]] = {
    "usual": [1.0, 0.5, 0.25], "nan": [1.0, math.nan, math.nan], "inf": [math.inf, -math.inf, 1.0],
    "all nan": [math.nan] * 3,
    "huge": [1e308, -1e308, 1e300], "tiny": [5e-324, 1e-300, 1e-310], "negative": [-1.0, -2.0, -3.0], "zero": [0.0] * 3,
    "one": [7.0],
}  # fmt: skip
COST = "efficient/export/latency_ms_batch_1"
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\ud800-\udfff]")


def comparison(name: str, values: list[float], variant: str = "variant") -> Comparison:
    def run(called: str, seed: int) -> Run:
        shifted = [v + 0.01 * seed * (called != "baseline") for v in values]
        cost = {"efficient/export/latency_ms_batch_1": Series([3], [1.0 + seed])}
        series = {printable(name): Series(list(range(len(shifted))), shifted), **cost}
        return Run(Path("x", called, f"seed_{seed}"), printable(called), f"seed_{seed}", series)

    runs = [run(called, seed) for called in ("baseline", variant) for seed in range(3)]
    return Comparison(runs, [printable(name)], "baseline", {printable(name): "min"})


def said(found: Any) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(found)
    return console.file.getvalue()  # type: ignore[attr-defined]


class Page(HTMLParser):
    """Counts elements: a name must not add one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Pictures take long: every third name always."""
    drawn = test == "test_any_name_goes_through_table_picture_and_page"
    return drawn and list(NAMES).index(cell["case"]) % 3 > 0


@pytest.mark.parametrize("case", NAMES)
def test_any_name_goes_through_table_picture_and_page(case: str) -> None:
    found = comparison(NAMES[case], VALUES["usual"], NAMES[case])
    text = said(found.table())
    assert not ACTS.search(text)
    assert "[/s]" not in NAMES[case] or "[/s]" in text, "shown as it is"
    assert png(found.figure()).startswith(b"\x89PNG")
    page, plain = to_html(found), to_html(comparison("val_loss", VALUES["usual"]))
    assert "could not be drawn" not in page
    assert not ACTS.search(page.replace("\t", ""))
    assert Page(page).tags.count("script") == Page(plain).tags.count("script")
    assert json.loads(json.dumps(found.to_dict()))["metrics"] == [printable(NAMES[case])]


@pytest.mark.parametrize("case", VALUES)
def test_any_numbers_go_through_table_picture_and_page(case: str) -> None:
    found = comparison("val_loss", VALUES[case])
    assert "val_loss" in said(found.table())
    assert png(found.figure()).startswith(b"\x89PNG")
    page = to_html(found)
    assert "could not be drawn" not in page
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


@pytest.mark.parametrize("case", NAMES)
def test_any_name_goes_through_the_table_of_runs_and_heatmaps(case: str) -> None:
    name = NAMES[case]
    row = RunRow(name, 0, "folder", "failed", f"ValueError: {name}", 1, 2.0, 0, 1, 1, 2, None, {name: 0.5})
    assert not ACTS.search(said(runs_table([row], name)))
    assert not ACTS.search(printable_lines("\n".join(errors([row]))).replace("\n", ""))
    image = heatmap([[0.5, math.nan], [math.inf, 1.0]], [name, f"{name}.x"], title=name, unit="nats", low=0.0, high=1.0)
    assert image.dtype == torch.uint8
    assert image.shape[1] < 4000
    assert image.shape[2] < 4000


LONG = {
    "word": "x" * 100,
    "words": "accuracy of the second head on domains that it has not seen, macro average over classes",
    "money": "$cost_{$" * 9,
}


@pytest.mark.parametrize("case", LONG)
def test_text_stays_inside_its_picture(case: str) -> None:
    name = LONG[case]
    series = [{name: Series([0, 1], [1.0, 0.5 + seed]), COST: Series([1], [1.0 + seed])} for seed in range(3)]
    variants = (name, f"{name} 2", "short")
    runs = [Run(Path("x"), called, f"seed_{seed}", s) for called in variants for seed, s in enumerate(series)]
    found = Comparison(runs, [name], name, {name: "min"})
    cost = next(quantity for quantity in found.quantities if quantity.ratio)
    pictures = [differences(found), pareto(found, [cost]), single(found.variants, name, title_of(name, found.better))]
    for figure in (*pictures, found.figure()):
        assert figure is not None
        FigureCanvasAgg(figure).draw()
        words = [text for text in figure.findobj(Drawn) if re.search("[a-z]{4}", text.get_text().replace("math", ""))]
        assert len(words) >= 2
        for text in words:
            (left, low), (right, high) = text.get_window_extent().get_points()
            assert min(left, low) >= 0, text.get_text()
            assert right <= figure.bbox.width, text.get_text()
            assert high <= figure.bbox.height, text.get_text()


@pytest.mark.parametrize("case", ["newlines", "escape code", "brackets", "long", "right to left", "percent"])
def test_names_are_asked_for_as_they_are(case: str, tmp_path: Path) -> None:
    """Also names that are shown otherwise, of metrics and of folders; and as they are shown."""
    name = NAMES[case]
    folder = name.replace("/", "-")[:100]
    for variant, seed in itertools.product((folder, "other"), range(2)):
        write_events(tmp_path / variant / f"seed_{seed}", [(1, 0.5, 1.0), (2, 0.25 + seed, 2.0)], name)
    for metric, baseline in ((f"{name}:min", folder), (printable(name), printable(folder))):
        found = compare(tmp_path, [metric], baseline)
        assert (found.metrics, found.baseline) == ([printable(name)], printable(folder))


def test_escapes() -> None:
    assert printable("a\x1b[31m\nb\u202e\udcff") == "a\\x1b[31m\\nb\\u202e\\udcff"
    assert printable("naïve 验证 🦙 ñ") == "naïve 验证 🦙 ñ"
    assert printable_lines("a\nb\r") == "a\nb\\r"
    assert len(printable("x" * 10_000)) <= 200
    assert rich_text("[bold]x").plain == "[bold]x"
    assert picture_text("_a $b$") == r" _a \$b\$"


# -- verdicts --------------------------------------------------------------------------------------------------------


def costs(ratio: float, spread: float, metric: float) -> Comparison:
    def run(called: str, seed: int) -> Run:
        other = called != "baseline"
        series = {
            "val_acc": Series([1], [0.9 + 0.01 * seed + metric * other]),
            "efficient/export/size_mib": Series([1], [10.0 * (ratio if other else 1.0)]),
            "efficient/export/latency_ms_batch_1": Series([1], [5.0 * (1.0 + spread * seed * other)]),
        }
        return Run(Path("x", called, f"seed_{seed}"), called, f"seed_{seed}", series)

    runs = [run(called, seed) for called in ("baseline", "small") for seed in range(4)]
    return Comparison(runs, ["val_acc"], "baseline", {"val_acc": "max"})


def level(found: Comparison) -> Comparison:
    """The same costs, and accuracies that differ by nothing but noise."""
    accuracies = [0, 0, 0, 0, 0.905, 0.9, 0.925, 0.925]
    runs = [
        r if r.variant == "baseline" else Run(r.path, r.variant, r.replica, {**r.series, "val_acc": Series([1], [v])})
        for r, v in zip(found.runs, accuracies, strict=True)
    ]
    return Comparison(runs, found.metrics, "baseline", found.better)


def test_a_smaller_model_at_no_measurable_loss_is_said_to_be_one() -> None:
    found = level(costs(0.68, 0.0, 0.0))
    (verdict,) = found.verdicts()
    assert verdict.call == "none"
    assert verdict.cost == "0.68 × the size at no measurable loss of val_acc."
    assert verdict.cost in to_html(found)
    assert verdict.gain == verdict.to_dict()["gain"] == "smaller"
    assert '<span class="badge better">Smaller, no measurable loss</span>' in to_html(found)


@pytest.mark.parametrize(
    ("found", "gain"),
    [
        (level(costs(0.98, 0.0, 0.0)), ""),  # not worth a word
        (level(costs(1.5, 0.0, 0.0)), ""),
        (level(costs(1.0, -0.1, 0.0)), ""),  # of the latency, with an interval around 1
        (costs(0.5, 0.0, -0.1), ""),  # too few runs differ in their loss to tell
    ],
)
def test_what_is_no_gain_is_not_called_one(found: Comparison, gain: str) -> None:
    assert found.verdicts()[0].gain == gain


def test_faster_by_itself_and_together() -> None:
    ratios = {"exported: size, MiB": (0.5, 0.5, 0.5), "exported: latency, batch 1, ms": (0.7, 0.71, 0.69)}
    faster = {name: Difference((1.0, 1.0, 1.0), values, True, True) for name, values in ratios.items()}
    assert gain_of(faster, "none") == "smaller and faster"
    assert gain_of({name: d for name, d in faster.items() if "latency" in name}, "none") == "faster"
    assert gain_of(faster, "worse") == gain_of(faster, "open") == gain_of({}, "none") == ""


def test_no_verdict_is_called_so_whatever_the_reason(tmp_path: Path) -> None:
    """Not "too few runs" where all of them diverged."""
    page = to_html(comparison("val_loss", [1.0, math.nan]))
    assert "runs ended in nan" in page
    assert '<span class="badge open">No verdict</span>' in page


def test_the_page_of_an_ablation_names_what_is_not_in_it() -> None:
    row = RunRow("wide <b>", 0, "x", "failed", "ValueError: no $ [/]\nFile", 1, 2.0, 0, 1, 1, 2, None, {})
    rows = [
        row, replace(row, seed=2), replace(row, seed=3, state="killed", error="killed by SIGKILL"),
        replace(row, variant="waits", state="waiting", error=None), replace(row, variant="b", state="finished"),
    ]  # fmt: skip
    remarks = _not_compared(rows)
    assert remarks == [
        "Not compared: wide <b>, seed 0, 2, failed: ValueError: no $ [/]",
        "Not compared: wide <b>, seed 3, killed: killed by SIGKILL", "Not compared: waits, seed 0, waiting",
    ]  # fmt: skip
    page = to_html(comparison("val_loss", VALUES["usual"]), remarks=remarks)
    assert "<li>Not compared: wide &lt;b&gt;, seed 0, 2, failed: ValueError: no $ [/]</li>" in page


def test_a_smaller_model_that_loses_is_said_to_lose() -> None:
    (verdict,) = costs(0.5, 0.0, -0.1).verdicts()
    assert verdict.cost == "" or verdict.cost.startswith("0.50 × the size and")


def test_a_latency_too_noisy_is_no_number() -> None:
    found = costs(0.68, 3.0, 0.0)
    (latency,) = [row for row in found.rows() if "latency" in row.quantity and row.variant == "small"]
    assert latency.difference is not None
    assert latency.difference.show() == "too noisy to tell"
    text = said(found.table())
    assert "too noisy for a mean" in text
    assert "Too noisy to tell: the latency." in found.verdicts()[0].cost


# -- files -----------------------------------------------------------------------------------------------------------


def write_csv(folder: Path, text: str = "step,val_loss\n1,0.5\n2,0.25\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text, encoding="utf-8")
    return folder


def write_events(folder: Path, rows: list[tuple[int, float, float]], name: str = "val_loss") -> Path:
    """Step, value, wall time of each, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder))
    for step, value, moment in rows:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        writer.add_event(Event(wall_time=moment, step=step, summary=summary))
    writer.close()
    return folder


def test_steps_count_and_not_the_clock(tmp_path: Path) -> None:
    write_events(tmp_path / "a" / "seed_0", [(1, 1.0, 900.0), (2, 0.5, 100.0), (3, 0.25, 50.0), (2, 0.75, 10.0)])
    (run,) = read_runs([tmp_path])
    assert run.series["val_loss"].steps == [1, 2, 3]
    assert run.series["val_loss"].values == [1.0, 0.75, 0.25], "what was written last for a step, whatever the time"
    assert run.seconds_per_step is None or run.seconds_per_step > 0


def fifo(file: Path) -> None:
    os.mkfifo(file)


BROKEN: dict[str, Any] = {
    "rubbish": lambda f: f.write_bytes(os.urandom(3000)),
    "no step": lambda f: f.write_text("epoch,val_loss\n1,2\n"),
    "words": lambda f: f.write_text("step,val_loss\nthree,much\n"),
    "nul bytes": lambda f: f.write_bytes(b"step,val_loss\n1,\x00\x00\n"),
    "a huge field": lambda f: f.write_text("step,val_loss\n1," + "9" * 200_000 + "\n"),
    "infinite step": lambda f: f.write_text("step,val_loss\ninf,1\n"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_log_alone_is_named(case: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    BROKEN[case](tmp_path / "a" / "metrics.csv")
    with pytest.raises(ValueError, match=r"metrics\.csv|no scalars"):
        compare(tmp_path)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_log_among_others_is_left_out_with_a_warning(case: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "good" / "seed_0")
    (tmp_path / "bad").mkdir()
    BROKEN[case](tmp_path / "bad" / "metrics.csv")
    with pytest.warns(UserWarning, match="left out"):
        found = compare(tmp_path)
    assert [run.variant for run in found.runs] == ["good/seed_0"] or len(found.runs) == 1


def test_what_is_good_of_a_run_is_read(tmp_path: Path) -> None:
    """A broken file is named and skipped; the other log of the run, or its other files, say the rest."""
    rows = [(1, 0.5, 1.0), (2, 0.25, 2.0)]
    write_csv(tmp_path / "both")
    (tmp_path / "both" / "events.out.tfevents.1.host").write_bytes(b"\x07" * 500)
    write_events(tmp_path / "two", rows)
    write_events(tmp_path / "other", [(3, 0.125, 3.0)])
    (tmp_path / "two" / "events.out.tfevents.0.host").write_bytes(b"\x07" * 500)
    write_events(tmp_path / "empty", [])
    write_csv(tmp_path / "empty")
    with pytest.warns(UserWarning, match="It is skipped") as caught:
        runs = {run.variant: run for run in read_runs([tmp_path])}
    assert sorted(runs) == ["both", "empty", "other", "two"]
    assert runs["two"].series["val_loss"].values == [0.5, 0.25]
    assert runs["both"].series.keys() == runs["empty"].series.keys() != set()
    said = [str(w.message) for w in caught]
    assert len(said) == 2
    assert all("events.out.tfevents" in text and text.endswith("It is skipped.") for text in said)


SPECIAL: dict[str, Any] = {
    "a pipe": fifo, "a folder": Path.mkdir, "a dead link": lambda f: f.symlink_to("nowhere"),
    "a link in a circle": lambda f: f.symlink_to(f.name),
}  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.csv", "events.out.tfevents.1.host", "hparams.yaml", "config.yaml"])
@pytest.mark.parametrize("case", SPECIAL)
def test_special_files_are_no_logs(case: str, name: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "good" / "seed_0")
    folder = tmp_path / "good" / "seed_0" if name.endswith("yaml") else tmp_path / "odd"
    folder.mkdir(exist_ok=True)
    SPECIAL[case](folder / name)
    assert len(compare(tmp_path).runs) == 1


@pytest.mark.parametrize("content", [b"", os.urandom(500), b"\x00" * 64])
def test_event_files_that_hold_nothing_readable(content: bytes, tmp_path: Path) -> None:
    write_events(tmp_path / "good", [(1, 0.5, 1.0), (2, 0.25, 2.0)])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "events.out.tfevents.1.host").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare(tmp_path)
    assert len(found.runs) == 1


def test_a_cut_event_file_gives_what_it_has(tmp_path: Path) -> None:
    folder = write_events(tmp_path / "a", [(step, 1.0 / step, float(step)) for step in range(1, 50)])
    (file,) = folder.glob("events*")
    file.write_bytes(file.read_bytes()[:-7])
    (run,) = read_runs([tmp_path])
    assert run.series["val_loss"].steps[:40] == list(range(1, 41))


@pytest.mark.parametrize("above", ["foreign", "rubbish", "none", "a run"])
def test_a_log_above_runs_hides_none_of_them(above: str, tmp_path: Path) -> None:
    """Such as the one that a monitor of the machine, or a first try, has left in the folder of all runs."""
    for variant, seed in itertools.product(("baseline", "small"), range(2)):
        write_csv(tmp_path / variant / f"seed_{seed}")
        write_csv(tmp_path / variant / f"seed_{seed}" / "version_0")  # part of it
    if above == "a run":
        write_csv(tmp_path)
    elif above == "none":
        write_events(tmp_path, [])
    else:
        (tmp_path / "metrics.csv").write_text("time,cpu\n1,2\n" if above == "foreign" else "\0\0")
    with nullcontext() if above == "a run" else pytest.warns(UserWarning, match="left out"):
        found = compare(tmp_path)
    runs = [("baseline", 0), ("baseline", 1), ("small", 0), ("small", 1)]
    assert [(run.variant, run.seed) for run in found.runs if run.seed is not None] == runs
    assert len(found.runs) == len(runs) + (above == "a run")


def test_what_belongs_to_a_run_is_none_of_its_own(tmp_path: Path) -> None:
    for folder in ("a/version_0", "a/version_0/loss_train", "a/version_1", "b", "b/more"):
        write_csv(tmp_path / folder)
    assert [(run.variant, run.replica) for run in compare(tmp_path).runs] == [
        ("a", "version_0"), ("a", "version_1"), ("b", ""),
    ]  # fmt: skip


def test_names_that_read_alike_stay_apart(tmp_path: Path) -> None:
    long = "grad_norm/" + "x" * 200
    tags = ["val_loss\n", "val_loss\\n", f"{long}1{long}", f"{long}2{long}"]
    for index, tag in enumerate(tags):
        for variant in ("a\tb", "a\\tb"):
            write_events(tmp_path / variant / "seed_0", [(1, index, 1.0)], tag)
    found = compare(tmp_path, ["*"])
    assert sorted({run.variant for run in found.runs}) == ["a\\tb", "a\\tb (2)"]
    for run in found.runs:
        assert sorted(series.values[0] for series in run.series.values()) == [0, 1, 2, 3]
        assert run.series["val_loss\\n"].values == [1], "the name itself comes first"
        assert run.series["val_loss\\n (2)"].values == [0]


@pytest.mark.filterwarnings("default")
def test_the_command_says_in_one_line_each_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "good")
    write_csv(tmp_path / "saved by a spreadsheet", "\ufeffstep,val_loss\n1,0.5\n")
    write_csv(tmp_path / "\x1b[31mred", "time,cpu\n1,2\n")
    write_csv(tmp_path / "empty", "")
    assert run_command("compare", tmp_path) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["warning"] * 2
    assert "a row without `step`" in lines[0]
    assert "no scalars logged in" in lines[1]
    assert "2 runs of 2 variants" in shown.out


@pytest.mark.parametrize("file", ["run-1.wandb", "mlruns/0/1/metrics/val_loss", "mlflow.db"])
def test_logs_of_another_kind_alone(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1 0.5 1")
    with pytest.raises(FileNotFoundError, match=r"Weights & Biases, MLflow and others .* CSVLogger beside theirs"):
        compare(tmp_path)


# -- writing ---------------------------------------------------------------------------------------------------------


def run_command(*args: object) -> int:
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("option", ["--json", "--png", "--html"])
@pytest.mark.parametrize("case", ["a full disk", "below a file", "a folder"])
def test_a_file_that_cannot_be_written_is_named_in_one_sentence(
    option: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "logs")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    target = {
        "a full disk": Path("/dev/full"),
        "below a file": tmp_path / "file" / "x",
        "a folder": tmp_path / "folder",
    }
    if case == "a full disk" and not target[case].exists():
        pytest.skip("no /dev/full")
    assert run_command("compare", tmp_path / "logs", f"{option}={target[case]}") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: cannot write")
    assert str(target[case]) in shown
    assert len(shown.strip().splitlines()) == 1


def test_the_numbers_are_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_csv(tmp_path / "logs")

    def fails(self: Comparison) -> Any:
        raise RuntimeError("no [fonts]")

    for name in ("table", "figure"):
        monkeypatch.setattr(Comparison, name, fails)
    out = {"--json": tmp_path / "n.json", "--png": tmp_path / "n.png", "--html": tmp_path / "n.html"}
    assert run_command("compare", tmp_path / "logs", *(f"{key}={value}" for key, value in out.items())) == 0
    shown = capsys.readouterr().out
    assert "The table is left out: RuntimeError: no [fonts]" in shown
    assert "The picture is left out: RuntimeError: no [fonts]" in shown
    assert json.loads((tmp_path / "n.json").read_text())["metrics"] == ["val_loss"]
    assert "<html" in (tmp_path / "n.html").read_text()
    assert not (tmp_path / "n.png").exists()


def test_a_picture_that_fails_leaves_the_page_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("lightning_efficient.comparison.html.single", fails)
    page = to_html(comparison("val_loss", VALUES["usual"]))
    assert "could not be drawn: RuntimeError: no fonts" in page or "could not be drawn: no fonts" in page
    assert "seed_0" in page


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a" / "b.txt"
    write_whole(file, "one")
    assert oct(file.stat().st_mode & 0o777) == oct(0o666 & ~_umask())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*b\.txt': No space left on device\."):
        write_whole(file, "two")
    assert file.read_text() == "one"
    assert [child.name for child in file.parent.iterdir()] == ["b.txt"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("metric", "label"),
    [("val/speed [m/s]", "speed [m/s]"), ("val_rate [/s]", "val_rate [/s]"), ("a/b/c", "c"), ("x (1/h)", "x (1/h)")],
)
def test_a_slash_of_a_unit_ends_no_name(metric: str, label: str) -> None:
    from lightning_efficient.comparison.curves import learning_curves
    from lightning_efficient.comparison.logs import Run, Series

    run = Run(Path("a"), "a", "", {metric: Series([0, 1], [1.0, 2.0])})
    figure = learning_curves({"a": [run]}, [metric], {metric: None})
    assert figure.axes[0].get_ylabel() == label
