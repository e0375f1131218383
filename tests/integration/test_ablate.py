"""``ablate`` from end to end: a user's own project, killed half way and continued; the same on Ray.

A process that imports Lightning is nearly all that this costs: what needs none is in ``tests/unit``, and
``lightning-efficient fit`` is trained by the demo's tests.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from forking import Child
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_efficient.ablation import starters
from lightning_efficient.ablation.board import BOARD
from lightning_efficient.ablation.files import CHECKPOINT, LOG, STATUS, read_json
from lightning_efficient.ablation.run import RESULT, Ablation, ablate
from lightning_efficient.cli import main
from lightning_efficient.comparison import read_runs

PROJECT = Path(__file__).parent / "scripts" / "own_project.py"
METHODS = ["norm_swap"]
VARIANTS = ["baseline", *METHODS]
SEEDS = [0, 1]
EPOCHS, STEPS = 3, 4
CONFIG = {
    "model": {"width": 8},
    "trainer": {
        "max_epochs": EPOCHS, "accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        # A folder of the user's own, which all runs would share.
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "best", "monitor": "val_loss"}}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's files, which no test may change."""
    folder = tmp_path_factory.mktemp("my [bold] $project")
    shutil.copy(PROJECT, folder / "train.py")
    (folder / "base.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return folder


def mtimes(folders: list[Path]) -> dict[Path, float]:
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file() and file.name != BOARD]
    return {file: file.stat().st_mtime for file in files}


def in_state(state: str, out: Path) -> list[Path]:
    return [file.parent for file in out.glob(f"*/seed_*/{STATUS}") if read_json(file)["state"] == state]


def run_in(folder: Path, *args: Any, **kwargs: Any) -> tuple[Ablation, str]:
    screen = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = ablate(*args, console=Console(file=screen, width=200), **kwargs)
    finally:
        os.chdir(before)
    return done, screen.getvalue()


@pytest.fixture(scope="module")
def continued(project: Path) -> tuple[Ablation, str, dict[str, Any]]:
    """Started as one command, killed with SIGKILL in its last run, and started again.

    The first runs fork a process that has imported Lightning; the last one begins anew, as a user's script does.
    """
    out = project / "out"
    command = ["ablate", "--script", "train.py", "-c", "base.yaml", "--methods", *METHODS]
    command += ["--seeds", *map(str, SEEDS), "--out", "out", "--jobs", "2", "--checkpoint-every", "0"]
    last = out / "norm_swap" / "seed_1"

    def start() -> None:
        os.chdir(project)
        os.environ |= {"OWN_PROJECT_HANGS": str(last), "OMP_NUM_THREADS": "1"}
        starters.warm_process = lambda *_: starters.Warm(["lightning.pytorch.cli", "torch.utils.tensorboard"], {})
        main(command)

    deadline = time.monotonic() + 600
    with (project / "first.log").open("w", encoding="utf-8") as log:
        first = Child(start, log.fileno())
        try:
            while not ((last / CHECKPOINT).exists() and len(in_state("finished", out)) == 3):
                assert first.poll() is None, (project / "first.log").read_text(encoding="utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            first.kill()
    killed, finished = in_state("running", out), in_state("finished", out)
    before = mtimes(finished)
    done, screen = run_in(
        project, METHODS, "train.py", ["--config=base.yaml"], seeds=SEEDS, out="out", n_jobs=2, checkpoint_every=0.0
    )
    facts = {"finished": finished, "before": before, "after": mtimes(finished), "killed": killed}
    return done, screen, facts


@pytest.mark.forks
@pytest.mark.slow
def test_a_killed_ablation_continues(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    done, screen, facts = continued
    assert [(run.variant, run.seed, run.state) for run in done.runs] == [
        (variant, seed, "finished") for seed in SEEDS for variant in VARIANTS
    ]
    assert facts["killed"] == [project / "out" / "norm_swap" / "seed_1"]
    assert len(facts["finished"]) == 3
    assert facts["before"] == facts["after"], "finished runs are not touched"
    for run in done.runs:
        folder = Path(run.folder)
        assert run.attempts == (2 if folder in facts["killed"] else 1)
        assert (run.epoch, run.step) == (EPOCHS, EPOCHS * STEPS)
        continued_from = f"--ckpt_path={folder / CHECKPOINT}"
        assert (continued_from in (folder / LOG).read_text(encoding="utf-8")) == (folder in facts["killed"])
        assert not (folder / CHECKPOINT).exists()
        assert len(list((folder / "checkpoints" / "best").glob("*.ckpt"))) == 1
    assert f"2 variants × 2 seeds, 1 of 4 runs to do, 1 at a time → {project / 'out'}\n" in screen
    assert f"curves    tensorboard --logdir '{project / 'out'}'\n" in screen
    assert not (project / "best").exists()
    assert sorted(file.name for file in project.iterdir()) == ["base.yaml", "first.log", "out", "train.py"]
    assert (project / "train.py").read_text(encoding="utf-8") == PROJECT.read_text(encoding="utf-8")


@pytest.mark.forks
@pytest.mark.slow
def test_runs_of_a_seed_start_alike(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    """By what the user's own script logged: the weights it made, and every batch of every epoch."""
    done, screen, _ = continued
    runs = {(run.variant, run.seed): run.series for run in read_runs([project / "out"])}
    for seed in SEEDS:
        base = runs["baseline", seed]
        assert len(base["batch"].values) == EPOCHS * STEPS
        assert len(set(base["batch"].values)) == EPOCHS * STEPS
        for variant in METHODS:
            assert runs[variant, seed]["batch"].values == base["batch"].values
            assert runs[variant, seed]["initial"].values == base["initial"].values
            assert runs[variant, seed]["train_loss"].values != base["train_loss"].values
    assert runs["baseline", 0]["batch"].values != runs["baseline", 1]["batch"].values
    assert done.notes == ["Every variant started from the baseline's weights and saw the same batches, seed by seed."]
    assert done.notes[0] in screen


@pytest.mark.forks
@pytest.mark.slow
def test_the_result(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    done, screen, _ = continued
    assert done.comparison is not None
    assert set(done.comparison.variants) == set(VARIANTS)
    written = json.loads((project / "out" / RESULT).read_text(encoding="utf-8"))
    assert [run["variant"] for run in written["runs"]] == VARIANTS * 2
    assert written["comparison"]["baseline"] == "baseline"
    assert (project / "out" / "curves.png").stat().st_size > 10_000
    assert "4 finished" in screen
    (record,) = (project / "out").rglob(BOARD)
    log = EventAccumulator(str(record.parent))
    log.Reload()
    content = log.summary_metadata["_hparams_/experiment"].plugin_data.content
    shown = [info.name.tag for info in plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos]
    assert shown[:5] == ["batch", "epoch", "initial", "train_loss", "val_loss"], (
        "the user's are the five that are shown"
    )
    assert "efficient/norm_swap/lam" in shown[5:], "of another run than this one"


@pytest.mark.exhaustive
@pytest.mark.forks
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning:ray")
def test_ray_gives_the_same(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    """Also: a run that was killed and continued equals one that was not; the test stage."""
    _, _, facts = continued
    killed = next(folder for folder in facts["killed"] if folder.parent.name != "baseline")
    variant, seed = killed.parent.name, int(killed.name.removeprefix("seed_"))
    done, _ = run_in(
        project, [variant], "train.py", ["--config=base.yaml"], seeds=[seed], out="on_ray", engine="ray", n_jobs=2,
        test=True,
    )  # fmt: skip
    assert [run.state for run in done.runs] == ["finished", "finished"]
    local = {run.variant: run.series for run in read_runs([project / "out"]) if run.seed == seed}
    ray = {run.variant: run.series for run in read_runs([Path(run.folder) for run in done.runs])}
    for name in ("baseline", variant):
        assert set(ray[name]) - set(local[name]) == {"test_loss"}
        logged = {scalar: series for scalar, series in local[name].items() if "run_cost" not in scalar}  # wall time
        assert len(logged) < len(local[name])
        for scalar, series in logged.items():
            assert series.steps == ray[name][scalar].steps
            assert series.values == ray[name][scalar].values, scalar
    assert all("test_loss" in run.metrics for run in done.runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "`seeds` should be different numbers"),
        ({"seeds": [1, 1]}, "`seeds` should be different numbers"),
        ({"n_jobs": 0}, "`n_jobs` should be at least 1; got 0"),
        ({"engine": "slurm"}, "`engine` should be one of local, ray; got 'slurm'"),
        ({"address": "auto"}, "`address` is for engine='ray'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(METHODS, "train.py", **arguments)
