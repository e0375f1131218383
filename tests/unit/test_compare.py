"""compare: numbers against closed forms and scipy, grouping of runs, the picture, bad input."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.colors
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from lightning_efficient.common.names import direction
from lightning_efficient.comparison import ENTROPY, Comparison, compare
from lightning_efficient.comparison.curves import COLOURS
from lightning_efficient.comparison.estimate import Difference, Estimate
from lightning_efficient.comparison.logs import read_runs


def log(
    folder: Path, values: dict[str, Sequence[float]], every: int = 10, seconds: float = 2.0, start: float = 1e9
) -> Path:
    """An event file with ``values`` at steps every, 2·every, ...; each entry ``seconds`` after the one before."""
    with SummaryWriter(str(folder)) as writer:
        for name, series in values.items():
            for i, value in enumerate(series, start=1):
                writer.add_scalar(name, value, every * i, walltime=start + seconds * i)
    return folder


def text_of(comparison: Comparison, width: int = 140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison.table())
    return console.export_text()


def row(comparison: Comparison, quantity: str, variant: str) -> Estimate:
    return next(r for r in comparison.rows() if (r.quantity, r.variant) == (quantity, variant)).estimate


def gap(comparison: Comparison, quantity: str, variant: str) -> Difference | None:
    return next(r for r in comparison.rows() if (r.quantity, r.variant) == (quantity, variant)).difference


LOSSES = {"baseline": [0.9, 1.1, 1.3], "sigma": [0.5, 0.9, 0.8]}


@pytest.fixture
def three_seeds(tmp_path: Path) -> Path:
    for variant, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            values = {"val_loss": [2.0, loss - 0.1, loss], "val_acc": [0.5, 0.75, 0.7]}
            log(tmp_path / variant / f"seed_{seed}", values)
    return tmp_path


# -- numbers -------------------------------------------------------------------------------------------------------


def test_means_intervals_and_paired_differences(three_seeds: Path) -> None:
    found = compare(three_seeds)
    assert found.metrics == ["val_acc", "val_loss"]
    assert found.baseline == "baseline"
    for variant, losses in LOSSES.items():
        final = row(found, "val_loss, final", variant)
        interval = stats.ttest_1samp(losses, 0).confidence_interval(0.95)
        assert final.values == pytest.approx(losses, rel=1e-6)
        assert final.mean == pytest.approx(sum(losses) / 3, rel=1e-6)
        assert 2 * final.half_width == pytest.approx(interval.high - interval.low, rel=1e-5)
        assert row(found, "val_loss, best (min)", variant).mean == pytest.approx(sum(losses) / 3 - 0.1, rel=1e-6)
        assert row(found, "val_acc, best (max)", variant).mean == pytest.approx(0.75)
        assert row(found, "val_acc, final", variant).mean == pytest.approx(0.7)
        assert row(found, "last logged step", variant).mean == 30
        assert row(found, "ms per step, median", variant).mean == pytest.approx(200)
    paired = stats.ttest_rel(LOSSES["sigma"], LOSSES["baseline"]).confidence_interval(0.95)
    difference = gap(found, "val_loss, final", "sigma")
    assert difference.mean - difference.half_width == pytest.approx(paired.low, rel=1e-5)
    assert difference.mean + difference.half_width == pytest.approx(paired.high, rel=1e-5)
    assert gap(found, "val_loss, final", "baseline") is None


def test_half_width_by_hand() -> None:
    # t(0.975, 2 degrees of freedom) = 4.30265 from the published table; s = 1 for 1, 2, 3.
    assert Estimate((1.0, 2.0, 3.0)).half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert Estimate((1.0, 2.0)).half_width == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.5,), "0.5"),
        ((1.0, 2.0, 3.0), "2.0 ± 2.5"),
        ((0.41700, 0.41734, 0.41711), "0.41715 ± 0.00043"),
        ((10000.0, 10100.0, 10200.0), "10100 ± 248"),
        ((79.0, 79.0), "79 ± 0"),
        ((1e-9, 2e-9, 3e-9), "2.000e-09 ± 2.5e-09"),
        ((1.0, math.nan, math.inf), "nan in 2 of 3"),
        ((), "not logged"),
    ],
)
def test_estimates_show_no_more_digits_than_are_known(values: tuple[float, ...], text: str) -> None:
    assert Estimate(values).show() == text


def test_an_infinite_run_leaves_no_mean() -> None:
    assert math.isnan(Estimate((1.0, math.inf)).mean)
    assert Estimate((1.0, math.inf)).to_dict() == {"mean": None, "half_width_95": None, "n": 2, "values": [1.0, None]}


def test_one_seed_gives_no_interval(tmp_path: Path) -> None:
    log(tmp_path / "baseline" / "seed_0", {"val_loss": [1.0, 0.5]})
    log(tmp_path / "sigma" / "seed_0", {"val_loss": [1.0, 0.4]})
    found = compare(tmp_path)
    assert row(found, "val_loss, final", "sigma").half_width is None
    assert gap(found, "val_loss, final", "sigma").mean == pytest.approx(-0.1)
    text = text_of(found)
    assert text.count("1 seed: no interval") == 8
    assert "(1 pair)" in text
    assert "0.4 ±" not in text


def test_diverged_runs_are_not_averaged_away(tmp_path: Path) -> None:
    for seed, last in enumerate([0.5, math.nan, 0.4]):
        log(tmp_path / "a" / f"seed_{seed}", {"val_loss": [1.0, 0.6, last]})
    found = compare(tmp_path)
    final = row(found, "val_loss, final", "a")
    assert math.isnan(final.mean)
    assert final.half_width is None
    assert row(found, "val_loss, best (min)", "a").mean == pytest.approx(0.5)
    assert "nan in 1 of 3" in text_of(found)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["rows"][0]["mean"] is None


def test_differences_pair_equal_seeds_only(tmp_path: Path) -> None:
    for variant, seeds in {"baseline": (0, 1, 2), "b": (1, 2, 5), "c": (7, 8)}.items():
        for seed in seeds:
            log(tmp_path / variant / f"seed_{seed}", {"val_loss": [1.0 + seed**2 + (variant == "b")]})
    found = compare(tmp_path)
    assert gap(found, "val_loss, final", "b").values == pytest.approx((1.0, 1.0))
    assert "+1, in every pair (2 pairs)" in text_of(found)
    unpaired = gap(found, "val_loss, final", "c")  # no seed in common: two independent groups
    assert (unpaired.paired, unpaired.values) == (False, ())
    assert "(unpaired)" in text_of(found)


def test_median_step_time_ignores_pauses_and_late_loggers(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "run")) as writer:
        moment = 1e9
        for step in range(10, 110, 10):
            moment += 500 if step == 50 else 1.0  # a pause
            writer.add_scalar("train_loss", 1.0, step, walltime=moment)
            if step % 50 == 0:
                writer.add_scalar("val_loss", 1.0, step, walltime=moment + 0.5)  # after validation
    assert read_runs([tmp_path])[0].seconds_per_step == pytest.approx(0.1)


def test_lowest_entropy_where_it_was_logged(tmp_path: Path) -> None:
    log(tmp_path / "baseline", {"val_loss": [1.0]})
    log(tmp_path / "sigma", {"val_loss": [1.0], ENTROPY: [2.0, 0.25, 1.0]})
    found = compare(tmp_path)
    assert row(found, "lowest head entropy, nats", "sigma").values == (0.25,)
    assert row(found, "lowest head entropy, nats", "baseline").values == ()
    assert "not logged" in text_of(found)
    assert [axes.get_title() for axes in found.figure().axes] == [
        "val_loss (lower is better)",
        "lowest head entropy, nats",
    ]


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("val_loss", "min"), ("valloss", "min"), ("val/acc_top1", "max"), ("test_accuracy", "max"), ("val_f1", "max"),
        ("val_error", "min"), ("val_perplexity", "min"), ("val_entropy", None), ("val_mapping", None),
        ("lossless_ratio", None),
    ],
)  # fmt: skip
def test_direction_is_read_off_whole_words(name: str, better: str | None) -> None:
    assert direction(name) == better


# -- which runs there are ------------------------------------------------------------------------------------------


def names(*paths: Path) -> list[tuple[str, str]]:
    return [(run.variant, run.replica) for run in read_runs(paths)]


def test_folders_become_variants_and_replicas(tmp_path: Path) -> None:
    values = {"val_loss": [1.0]}
    for folder in ("a/seed_2", "a/seed_10", "b/version_0", "b/version_1", "c/seed_0/version_0", "d"):
        log(tmp_path / folder, values)
    log(tmp_path / "d" / "inner", values)  # TensorBoard's add_scalars makes such folders
    expected = [
        ("a", "seed_2"), ("a", "seed_10"), ("b", "version_0"), ("b", "version_1"), ("c", "seed_0/version_0"), ("d", "")
    ]  # fmt: skip
    assert names(tmp_path) == expected
    assert names(tmp_path, tmp_path / "a") == expected  # named twice, read once
    assert names(*(tmp_path / name for name in "abcd")) == expected
    assert names(tmp_path / "a") == [("a", "seed_2"), ("a", "seed_10")]
    assert names(tmp_path / "a" / "seed_2") == [("a", "seed_2")]


def test_versions_with_other_hparams_are_other_variants(tmp_path: Path) -> None:
    for version, hparams in enumerate(["lr: 0.1\nseed: 0\n", "lr: 0.1\nseed: 1\n"]):
        folder = log(tmp_path / "same" / f"version_{version}", {"val_loss": [1.0]})
        (folder / "hparams.yaml").write_text(hparams)
    for version, hparams in enumerate(["sigma_reparam: false\n", "sigma_reparam: true\n"]):
        folder = log(tmp_path / "lightning_logs" / f"version_{version}", {"val_loss": [1.0]})
        (folder / "hparams.yaml").write_text(hparams)
    assert names(tmp_path) == [
        ("lightning_logs/version_0", ""), ("lightning_logs/version_1", ""), ("same", "version_0"), ("same", "version_1")
    ]  # fmt: skip


def test_the_last_version_of_a_seed_counts_once(tmp_path: Path) -> None:
    for version, loss in ((0, 9.0), (9, 5.0), (10, 1.0)):
        log(tmp_path / "a" / "seed_0" / f"version_{version}", {"val_loss": [loss]})
    log(tmp_path / "a" / "seed_1", {"val_loss": [2.0]})
    with pytest.warns(UserWarning, match="left out") as caught:
        found = compare(tmp_path)
    assert len(caught) == 2
    assert row(found, "val_loss, final", "a").values == pytest.approx((1.0, 2.0))


def test_variants_in_several_places_keep_distinct_names(tmp_path: Path) -> None:
    for folder in ("x/base/seed_0", "y/base/seed_0"):
        log(tmp_path / folder, {"val_loss": [1.0]})
    assert names(tmp_path / "x", tmp_path / "y") == [("x/base", "seed_0"), ("y/base", "seed_0")]


def test_seeds_noted_beside_the_log_make_pairs(tmp_path: Path) -> None:
    for variant, shift in {"baseline": 0.0, "b": 1.0}.items():
        for version, seed in enumerate((5, 3, 4) if shift else (3, 4, 5)):
            folder = log(tmp_path / variant / f"version_{version}", {"val_loss": [seed + shift]})
            (folder / "hparams.yaml").write_text("a: 1\n" if version else f"a: 1\nseed: {seed}\n")
            if version:
                (folder / "config.yaml").write_text(f"seed_everything: {seed}\ntrainer:\n  seed: 99\n")
    found = compare(tmp_path)
    assert [run.seed for run in found.runs] == [5, 3, 4, 3, 4, 5]
    assert gap(found, "val_loss, final", "b").values == pytest.approx((1.0, 1.0, 1.0))


def test_equal_seeds_within_a_variant_make_no_pairs(tmp_path: Path) -> None:
    for variant in ("baseline", "b"):
        for version in range(3):
            folder = log(tmp_path / variant / f"version_{version}", {"val_loss": [1.0 + version]})
            (folder / "config.yaml").write_text("seed_everything: 0\n")
    assert not gap(compare(tmp_path), "val_loss, final", "b").paired


def test_a_direction_the_name_does_not_tell(three_seeds: Path) -> None:
    log(three_seeds / "baseline" / "seed_0", {"score": [1.0, 3.0, 2.0]})
    assert "score, best" not in text_of(compare(three_seeds, ["score"]))
    found = compare(three_seeds, ["score:max", "val_loss"], judge="best")
    assert found.headline.name == "score, best (max)"
    assert row(found, "score, best (max)", "baseline").mean == 3.0
    with pytest.raises(ValueError, match=r"`judge` is 'last'; expected 'final' or 'best'"):
        compare(three_seeds, judge="last")


def test_a_resumed_run_is_read_as_one(tmp_path: Path) -> None:
    log(tmp_path / "a", {"val_loss": [5.0, 4.0, 3.0]}, start=1e9)
    with SummaryWriter(str(tmp_path / "a"), filename_suffix=".resumed") as writer:
        for step, value in ((20, 2.0), (30, 1.0), (40, 0.5)):
            writer.add_scalar("val_loss", value, step, walltime=2e9 + step)
    series = read_runs([tmp_path])[0].series["val_loss"]
    assert series.steps == [10, 20, 30, 40]
    assert series.values == [5.0, 2.0, 1.0, 0.5]


def test_the_tenth_file_of_a_process_comes_after_the_ninth(tmp_path: Path) -> None:
    log(tmp_path / "a", {"val_loss": [5.0, 4.0]})
    (first,) = (tmp_path / "a").iterdir()
    log(tmp_path / "b", {"val_loss": [5.0, 2.0]})
    (second,) = (tmp_path / "b").iterdir()
    first.rename(tmp_path / "a" / "events.out.tfevents.1700000000.host.7.9")
    second.rename(tmp_path / "a" / "events.out.tfevents.1700000000.host.7.10")
    assert read_runs([tmp_path / "a"])[0].series["val_loss"].values == [5.0, 2.0]


def test_more_points_than_tensorboard_shows_by_default(tmp_path: Path) -> None:
    log(tmp_path, {"val_loss": [float(i) for i in range(12_000)]}, every=1)
    assert read_runs([tmp_path])[0].series["val_loss"].values == list(map(float, range(12_000)))


def test_what_lightnings_own_loggers_write(tmp_path: Path) -> None:
    for kind, cls in {"tb": TensorBoardLogger, "csv": CSVLogger}.items():
        for variant, factor in {"baseline": 1.0, "sigma": 0.5}.items():
            logger = cls(tmp_path / kind, name=variant, version="seed_0")
            logger.log_hyperparams({"sigma_reparam": variant == "sigma"})
            for step in (3, 7, 11):
                logger.log_metrics({"train_loss": factor / (step + 1), "epoch": 0}, step)
            logger.log_metrics({"val_loss": factor, "val_acc": 0.75, "epoch": 0}, 11)
            logger.save()
            logger.finalize("success")
    tables = []
    for kind in ("tb", "csv"):
        found = compare(tmp_path / kind)
        assert found.metrics == ["val_acc", "val_loss", "train_loss"]
        assert row(found, "train_loss, final", "sigma").mean == pytest.approx(0.5 / 12)
        tables.append({(r.quantity, r.variant): r.estimate.mean for r in found.rows()})
    timed = ("ms per step, median", "baseline"), ("ms per step, median", "sigma")
    assert tables[0].keys() - tables[1].keys() == set(timed)  # CSVLogger keeps no times
    assert all(tables[0][key] == pytest.approx(value, rel=1e-6) for key, value in tables[1].items())


# -- output --------------------------------------------------------------------------------------------------------


def test_table_and_dict_say_the_same(three_seeds: Path) -> None:
    found = compare(three_seeds, metrics=["val_loss"])
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    text = text_of(found)
    assert "6 runs of 2 variants" in text
    for entry in data["rows"]:
        estimate = row(found, entry["quantity"], entry["variant"])
        assert estimate.show() in text
        assert entry["mean"] == pytest.approx(estimate.mean)
        assert entry["n"] == entry["runs"] == 3
    assert len(data["runs"]) == 6
    assert data["runs"][0]["values"]["val_loss, final"] == pytest.approx(0.9)
    assert all(len(line) <= 100 for line in text_of(found, 100).splitlines())


def test_figure_has_a_labelled_line_for_every_run(three_seeds: Path) -> None:
    found = compare(three_seeds)
    figure = found.figure()
    assert [axes.get_title() for axes in figure.axes] == ["val_acc (higher is better)", "val_loss (lower is better)"]
    for axes, metric in zip(figure.axes, found.metrics, strict=True):
        assert axes.get_xlabel() == "training step"
        assert axes.get_ylabel() == metric
        drawn = sorted((list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines)
        expected = sorted((run.series[metric].steps, run.series[metric].values) for run in found.runs)
        assert drawn == expected
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[1].lines}
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["baseline (3 runs)", "sigma (3 runs)"]
    assert {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()} == styles
    assert len(styles) == 2
    picture = io.BytesIO()
    figure.savefig(picture)  # lays out without a warning
    assert picture.getvalue().startswith(b"\x89PNG")


def test_legend_fits_the_picture(tmp_path: Path) -> None:
    for i in range(9):
        log(tmp_path / f"a variant with quite a long name {i}", {"val_loss": [1.0, 0.5]})
    figure = compare(tmp_path).figure()
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 < figure.axes[0].get_window_extent().y0


def test_figure_marks_divergence_and_keeps_the_others_readable(tmp_path: Path) -> None:
    log(tmp_path / "good", {"val_loss": [1.0, 0.5, 0.4]})
    log(tmp_path / "bad", {"val_loss": [1.0, 3e4, math.nan]})
    axes = compare(tmp_path).figure().axes[0]
    assert axes.get_yscale() == "log"
    crosses = [line for line in axes.lines if line.get_marker() == "X"]
    assert [(list(c.get_xdata()), list(c.get_ydata())) for c in crosses] == [([20], [3e4])]


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (4, 4), (5, 5), (7, 7)])
def test_one_panel_per_metric_however_many(count: int, panels: int, tmp_path: Path) -> None:
    log(tmp_path / "run", {f"val_loss_{i}": [1.0, 0.5] for i in range(count)})
    assert len(compare(tmp_path, ["val_loss_*"]).figure().axes) == panels


def test_colours_differ_for_the_colour_blind() -> None:
    """Under simulated red- and green-blindness (Viénot et al. 1999); in grey the dash patterns tell lines apart."""
    simulations = {
        "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    linear = [[c**2.2 for c in matplotlib.colors.to_rgb(colour)] for colour in COLOURS]
    for matrix in simulations.values():
        seen = [[sum(w * c for w, c in zip(r, rgb, strict=True)) for r in matrix] for rgb in linear]
        for a, b in pairwise(seen):
            assert math.dist(a, b) > 0.1
    for rgb in linear:
        luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
        assert 1.05 / (luminance + 0.05) > 2.2  # contrast with white


# -- bad input -----------------------------------------------------------------------------------------------------


def test_no_logs_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no logs in .*events\.out\.tfevents\.\*.*metrics\.csv"):
        compare(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        compare([tmp_path, tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="an empty list"):
        compare([])


def test_a_metric_no_run_has_names_near_misses(three_seeds: Path) -> None:
    with pytest.raises(ValueError, match=r"'val_los'\. Did you mean 'val_loss'.*Logged: \['val_acc', 'val_loss'\]"):
        compare(three_seeds, metrics=["val_acc", "val_los"])


def test_a_metric_only_some_runs_have_is_shown_as_such(three_seeds: Path) -> None:
    log(three_seeds / "baseline" / "seed_3", {"other_loss": [1.0]})
    with pytest.raises(ValueError, match=r"share no val_\*.*other_loss"):
        compare(three_seeds)
    assert "3 of 4" in text_of(compare(three_seeds, metrics=["val_loss"]))


def test_unknown_baseline(three_seeds: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`baseline` is 'basline'.*\['baseline', 'sigma'\]\. Did you mean 'baseline'\?"
    ):
        compare(three_seeds, baseline="basline")
    assert compare(three_seeds, baseline="sigma").baseline == "sigma"


def test_without_a_baseline_there_are_no_differences(tmp_path: Path) -> None:
    for name in "ab":
        log(tmp_path / name, {"val_loss": [1.0]})
    found = compare(tmp_path)
    assert found.baseline is None
    assert all(r.difference is None for r in found.rows())


def test_logs_without_scalars(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "empty")) as writer:
        writer.add_text("note", "no scalar")
    with pytest.raises(ValueError, match=r"no scalars: .*empty"):
        compare(tmp_path)
    log(tmp_path / "full", {"val_loss": [1.0]})
    with pytest.warns(UserWarning, match=r"no scalars logged in .*empty: left out"):
        assert [run.variant for run in compare(tmp_path).runs] == ["full"]


def test_foreign_csv(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv': a row without `step`"):
        compare(tmp_path)


def test_a_truncated_event_file_gives_what_it_holds(tmp_path: Path) -> None:
    log(tmp_path / "a", {"val_loss": [1.0, 0.5, 0.25]})
    file = next((tmp_path / "a").glob("events*"))
    file.write_bytes(file.read_bytes()[:-7])
    assert read_runs([tmp_path])[0].series["val_loss"].values == [1.0, 0.5]
