"""``ablate`` from end to end: a user's own project, killed half way and continued; the same on Ray; refusals."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import lightning_efficient
from lightning_efficient.ablate.files import CHECKPOINT, LOG, STATUS, read_json
from lightning_efficient.ablate.run import RESULT, Ablation, ablate
from lightning_efficient.compare import read_runs

# Some twenty processes, minutes of two cores: asked for by name until it is known what it costs on a quiet machine.
pytestmark = pytest.mark.skipif("ABLATE_END_TO_END" not in os.environ, reason="set ABLATE_END_TO_END=1 to run it")

PROJECT = Path(__file__).parent / "scripts" / "own_project.py"
METHODS = ["sigma_reparam", "norm_swap", "magnitude_pruning"]
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
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(PROJECT, folder / "train.py")
    (folder / "base.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return folder


def mtimes(folders: list[Path]) -> dict[Path, float]:
    return {file: file.stat().st_mtime for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()}


def states(out: Path) -> dict[Path, str]:
    return {file.parent: read_json(file)["state"] for file in out.glob(f"*/seed_*/{STATUS}")}


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
    """Started as one command, killed with SIGKILL half way, and started again."""
    out = project / "out"
    command = [sys.executable, "-m", "lightning_efficient", "ablate", "--script", "train.py", "-c", "base.yaml"]
    command += ["--methods", *METHODS, "--seeds", *map(str, SEEDS), "--out", "out", "--jobs", "2"]
    command += ["--checkpoint-every", "0"]
    slow = {**os.environ, "OWN_PROJECT_PAUSE": "0.4", "OMP_NUM_THREADS": "1"}
    with (project / "first.log").open("w", encoding="utf-8") as log:
        first = subprocess.Popen(command, cwd=project, env=slow, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 3600
    interesting: list[Path] = []
    try:
        while not (interesting and sum(state == "finished" for state in states(out).values()) >= 3):
            assert first.poll() is None, (project / "first.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.05)
            running = [folder for folder, state in states(out).items() if state == "running"]
            interesting = [folder for folder in running if (folder / CHECKPOINT).exists()]
    finally:
        first.kill()
        first.wait()
    then = states(out)
    finished = [folder for folder, state in then.items() if state == "finished"]
    before = mtimes(finished)
    done, screen = run_in(
        project, METHODS, "train.py", ["--config=base.yaml"], seeds=SEEDS, out="out", n_jobs=2, checkpoint_every=0.0
    )
    facts = {"finished": finished, "before": before, "after": mtimes(finished), "interesting": interesting}
    return done, screen, facts


@pytest.mark.slow
def test_a_killed_ablation_continues(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    done, screen, facts = continued
    assert [(run.variant, run.seed, run.state) for run in done.runs] == [
        (variant, seed, "finished") for seed in SEEDS for variant in VARIANTS
    ]
    assert 3 <= len(facts["finished"]) < 8
    assert facts["before"] == facts["after"], "finished runs are not touched"
    for run in done.runs:
        # What was killed before its first resume point began anew, and counts from one again.
        assert run.attempts == (2 if Path(run.folder) in facts["interesting"] else 1)
        assert (run.epoch, run.step) == (EPOCHS, EPOCHS * STEPS)
        if Path(run.folder) in facts["interesting"]:
            assert f"--ckpt_path={Path(run.folder) / CHECKPOINT}" in (Path(run.folder) / LOG).read_text(
                encoding="utf-8"
            )
        assert not (Path(run.folder) / CHECKPOINT).exists()
        assert len(list((Path(run.folder) / "checkpoints" / "best").glob("*.ckpt"))) == 1
    assert f"{8 - len(facts['finished'])} of 8 runs to do" in screen
    assert not (project / "best").exists()
    assert sorted(file.name for file in project.iterdir()) == ["base.yaml", "first.log", "out", "train.py"]
    assert (project / "train.py").read_text(encoding="utf-8") == PROJECT.read_text(encoding="utf-8")


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


@pytest.mark.slow
def test_the_result(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    done, screen, _ = continued
    assert done.comparison is not None
    assert set(done.comparison.variants) == set(VARIANTS)
    written = json.loads((project / "out" / RESULT).read_text(encoding="utf-8"))
    assert [run["variant"] for run in written["runs"]] == VARIANTS * 2
    assert written["comparison"]["baseline"] == "baseline"
    assert (project / "out" / "curves.png").stat().st_size > 10_000
    assert "8 finished" in screen
    with pytest.raises(ValueError, match=r"`model.width` was 8, is 16"):
        run_in(project, METHODS, "train.py", ["--config=base.yaml", "--model.width=16"], seeds=SEEDS, out="out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning:ray")
def test_ray_gives_the_same(continued: tuple[Ablation, str, dict[str, Any]], project: Path) -> None:
    """Also: a run that was killed and continued equals one that was not; failures are rows; the test stage."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    _, _, facts = continued
    killed = facts["interesting"][0]
    variant, seed = killed.parent.name, int(killed.name.removeprefix("seed_"))
    variants = {"there": {METHODS[0] if variant == "baseline" else variant: True}, "no_attention": {"temp_scale": True}}
    done, screen = run_in(
        project, variants, "train.py", ["--config=base.yaml"], seeds=[seed], out="on_ray", engine="ray", n_jobs=2,
        test=True,
    )  # fmt: skip
    assert [run.state for run in done.runs] == ["finished", "finished", "failed"]
    local = {run.variant: run.series for run in read_runs([project / "out"]) if run.seed == seed}
    ray = {run.variant: run.series for run in read_runs([Path(run.folder) for run in done.runs[:2]])}
    for theirs, ours in {"baseline": "baseline", "there": next(iter(variants["there"]))}.items():
        assert set(ray[theirs]) - set(local[ours]) == {"test_loss"}
        for name, series in local[ours].items():
            assert series.steps == ray[theirs][name].steps
            assert series.values == ray[theirs][name].values, name
    failed = done.runs[2]
    assert "TempScale: no attention was seen" in str(failed.error)
    assert f"no_attention, seed {seed}: {str(failed.error).splitlines()[0]}" in screen
    assert "--retry-failed" in screen
    assert all("test_loss" in run.metrics for run in done.runs[:2])


@pytest.mark.slow
def test_methods_as_keys_of_the_configuration(project: Path) -> None:
    """``lightning-efficient fit``: the methods go in as a second config file."""
    file = Path(lightning_efficient.__file__).parent / "demo" / "baseline.yaml"
    small = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--model.depth=1", "--model.embed_dim=16"]
    done, _ = run_in(
        project, ["sigma_reparam"], None, [f"--config={file}", *small, "--model.num_heads=2"], seeds=[5], out="keys"
    )
    assert done.finished, [run.error for run in done.runs]
    configs = [yaml.safe_load((Path(run.folder) / "config.yaml").read_text(encoding="utf-8")) for run in done.runs]
    assert [config["sigma_reparam"]["enabled"] for config in configs] == [False, True]
    assert all(config["collapse_monitor"]["enabled"] and config["seed_everything"] == 5 for config in configs)


@pytest.mark.slow
def test_what_is_refused_before_any_run(project: Path) -> None:
    (project / "plain.py").write_text(
        "from lightning.pytorch import Trainer\nTrainer(logger=False)\nprint('training for hours')", encoding="utf-8"
    )
    wrong = [
        ("train.py", ["--config=base.yaml", "--model.widht=3"], "'?model.widht"),
        ("plain.py", [], "`ablate` runs LightningCLI scripts"),
    ]
    for script, arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            run_in(project, METHODS, script, arguments, out="refused")
    (project / "plain.py").unlink()
    assert not (project / "refused").exists()


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
