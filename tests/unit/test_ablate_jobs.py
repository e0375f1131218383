"""Jobs, engines, the plan and its lock, with processes that train nothing: fast, and every way to end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.engines import LocalEngine, gpus_of_a_run, make_slots
from lightning_efficient.ablation.files import CHECKPOINT, LOG, PROGRESS, START, STATUS, read_json, write_json
from lightning_efficient.ablation.job import Job, error_lines, run_job
from lightning_efficient.ablation.pairing import started_alike
from lightning_efficient.ablation.plan import check, jobs, locked, plan
from lightning_efficient.ablation.program import Program, find_program, loggers
from lightning_efficient.ablation.run import _report, _watch
from lightning_efficient.ablation.view import View, _of, duration, errors, row_of, shown_metric, table

DONE = "import json; json.dump({'fitted': True, 'best': 'b.ckpt'}, open('progress.json', 'w')); "


def job(folder: Path, fit: str, **steps: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    lines = {name: ["-c", code] for name, code in {"fit": fit, **steps}.items()}
    return Job(str(folder), lines, {"MINE": "1"}, str(folder), 0.0)


@pytest.mark.parametrize(
    ("code", "state", "error"),
    [
        (DONE, "finished", None),
        ("def f(): raise ValueError('no such\\nthing')\nf()", "failed", 'ValueError: no such\nthing\nFile "<string>"'),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "killed by SIGKILL"),
        ("import os; os.abort()", "failed", "ended by SIGABRT"),
        ("print('bye')", "failed", "before training was over"),
        (f"{DONE} import sys; sys.exit('usage: x\\nx: error: bad key')", "failed", "x: error: bad key\n(exit code 1)"),
    ],
)
def test_how_a_job_ends(tmp_path: Path, code: str, state: str, error: str | None) -> None:
    run_job(job(tmp_path, code))
    status = read_json(tmp_path / STATUS)
    assert status["state"] == state
    assert (error or "") in (status["error"] or "")
    assert (status["error"] is None) == (error is None)
    assert status["attempts"] == 1
    assert status["done"] == (["fit"] if state == "finished" else [])
    assert (tmp_path / LOG).read_text(encoding="utf-8").startswith("$ ")


def test_steps_follow_each_other(tmp_path: Path) -> None:
    seen = "import os, sys; words = [*sys.argv[1:], os.environ['MINE'], *sorted(os.listdir())]; "
    seen += "open('seen.txt', 'a').write(' '.join(words))"
    (tmp_path / "config.yaml").write_text("of an earlier attempt", encoding="utf-8")
    (tmp_path / "methods.yaml").write_text("{}", encoding="utf-8")
    run_job(job(tmp_path, DONE, test=seen))
    text = (tmp_path / "seen.txt").read_text(encoding="utf-8")
    assert text.startswith("--ckpt_path=b.ckpt 1 ")
    assert "fit_config.yaml" in text
    assert "methods.yaml" in text.split()
    assert read_json(tmp_path / STATUS)["done"] == ["fit", "test"]


def test_no_attempt_and_no_step_loses_the_csv_file_of_another(tmp_path: Path) -> None:
    """A CSVLogger empties the folder that it is given."""
    given = {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}}}
    (fit, test) = (loggers(given, tmp_path, step)[1]["init_args"]["version"] for step in ("fit", "test"))
    write = "import os; os.makedirs('{0}', exist_ok=True); open('{0}/metrics.csv', 'w').write('{1}'); "
    for attempt in "12":
        run_job(job(tmp_path, write.format(fit, f"fit {attempt}") + "1/0"))
    run_job(job(tmp_path, write.format(fit, "fit 3") + DONE, test=write.format(test, "test")))
    assert {file.read_text("utf-8") for file in tmp_path.glob("*/metrics.csv")} == {"fit 1", "fit 2", "fit 3", "test"}
    assert (tmp_path / fit / "metrics.csv").read_text("utf-8") == "fit 3"


def test_a_model_without_a_test_stage_is_not_tested(tmp_path: Path) -> None:
    run_job(job(tmp_path, DONE.replace("}", ", 'has_test': False}"), test="1/0"))
    assert read_json(tmp_path / STATUS)["state"] == "finished"


def test_stopping_ends_everything_that_was_started(tmp_path: Path) -> None:
    """Also a process that the process started, and one that does not react to being asked."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {stubborn!r}]); "
    code += "open('child', 'w').write(str(p.pid)); time.sleep(60)"
    engine = LocalEngine([{}])
    engine.start([job(tmp_path / "a", code), job(tmp_path / "b", DONE)])
    child = tmp_path / "a" / "child"
    deadline = time.monotonic() + 30
    while not (child.exists() and child.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        assert not engine.wait(0.05)
    engine.stop()
    assert read_json(tmp_path / "a" / STATUS)["state"] == "interrupted"
    assert read_json(tmp_path / "b" / STATUS) == {}
    number = int(child.read_text(encoding="utf-8"))
    state = Path(f"/proc/{number}/stat")  # without /proc nothing is seen

    def alive() -> bool:  # rather than gone, or a zombie that nobody has reaped yet
        try:
            return state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while alive() and time.monotonic() < deadline + 30:  # killed, which a busy machine takes a moment to carry out
        time.sleep(0.05)
    assert not alive()


def test_jobs_run_at_the_same_time_and_no_more_than_there_are_slots(tmp_path: Path) -> None:
    code = "import os, time; open(f'{time.time()}', 'w'); time.sleep(0.3); open(f'{time.time()}', 'w'); "
    code += f"open('slot', 'w').write(os.environ['SLOT']); {DONE}"
    engine = LocalEngine([{"SLOT": "a"}, {"SLOT": "b"}])
    engine.start([job(tmp_path / str(i), code) for i in range(4)])
    while not engine.wait(1):
        pass
    engine.stop()
    spans = [sorted(float(f.name) for f in (tmp_path / str(i)).iterdir() if f.name[0] == "1") for i in range(4)]
    at_once = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(at_once) <= 2
    assert {(tmp_path / str(i) / "slot").read_text(encoding="utf-8") for i in range(4)} <= {"a", "b"}


def test_an_error_of_our_own_is_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = Job(str(tmp_path / "file" / "missing"), {"fit": ["-c", ""]}, {}, str(tmp_path), 0.0)
    engine = LocalEngine([{}])
    engine.start([wrong])
    with pytest.raises(NotADirectoryError, match="missing"):
        engine.wait(10)
    engine.stop()


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (["val_f2"], "no run has the metric 'val_f2'. Did you mean 'val_f1'?"),
        (["val_f1", "*loss"], "no run has the metric '*loss'"),
        (None, "the runs share no val_*, *loss or *acc; choose `metrics`"),
        (["score:max"], ""),
    ],
)
def test_what_cannot_be_compared_is_said_after_the_first_run(
    tmp_path: Path, metrics: list[str] | None, said: str
) -> None:
    name = "score" if metrics is None or said == "" else "val_f1"
    log = f"open('metrics.csv', 'w').write('step,{name}\\n1,0.5\\n')"
    runs = plan({"baseline": {}, "a": {}}, [0, 1], tmp_path)
    screen = io.StringIO()
    engine = LocalEngine([{}])
    engine.start([job(run.folder, DONE + log) for run in runs])
    _watch(engine, runs, View(Console(file=screen, width=200), metrics), metrics)
    engine.stop()
    lines = [line for line in screen.getvalue().splitlines() if "note: " in line]
    assert len(lines) == bool(said)
    assert not lines or f"baseline seed 0 has finished, and cannot be compared: {said}" in lines[0]
    assert not lines or lines[0].endswith("other `metrics` continues, and repeats no finished run.")


def test_steps_of_several_optimizers_are_more_than_were_foreseen() -> None:
    assert [_of(None, 4), _of(3, 4), _of(4, 4), _of(8, 4), _of(8, None)] == ["", "3/4", "4/4", "8", "8"]


@pytest.mark.parametrize("file", ["curves.png", "report.html"])
def test_what_was_found_is_printed_even_if_a_file_of_it_cannot_be_written(tmp_path: Path, file: str) -> None:
    runs = plan({"baseline": {}, "a": {}}, [0], tmp_path)
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.csv").write_text("step,val_loss\n1,0.5\n")
        write_json(run.folder / STATUS, {"state": "finished"})
    (tmp_path / file).mkdir()  # as well as a full disk
    screen = io.StringIO()
    with pytest.raises(OSError, match=rf"cannot write '.*{file}': Is a directory"):
        _report(tmp_path, runs, None, Console(file=screen, width=200), [])
    assert "val_loss, final" in screen.getvalue()
    assert "No verdict from 1 seed" in screen.getvalue()
    assert file not in screen.getvalue()
    assert read_json(tmp_path / "ablation.json")["comparison"]["metrics"] == ["val_loss"]


@pytest.mark.parametrize(
    ("trainer", "jobs", "gpus", "devices"),
    [
        ({"accelerator": "cpu"}, 3, ["0", "1"], [None] * 3),
        ({"accelerator": "auto", "devices": 1}, None, ["0", "1"], ["0", "1"]),
        ({"accelerator": "auto", "devices": "auto"}, None, ["0", "1"], ["0,1"]),
        ({"accelerator": "gpu", "devices": 2}, None, ["4", "5", "6", "7", "8"], ["4,5", "6,7"]),
        ({"accelerator": "gpu", "devices": [0]}, 3, ["0", "1"], ["0", "1", "0"]),
        ({"accelerator": "auto"}, 2, [], [None] * 2),
    ],
)
def test_slots(trainer: dict[str, Any], jobs: int | None, gpus: list[str], devices: list[str | None]) -> None:
    slots = make_slots({"trainer": trainer}, jobs, 2, gpus)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots] == devices
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"2"}
    assert gpus_of_a_run({"trainer": trainer}, len(gpus)) == (len(devices[0].split(",")) if devices[0] else 0)


# -- the plan

CONFIG: dict[str, Any] = {"trainer": {"max_epochs": 2, "logger": None}, "model": {"lr": 0.1}}
VARIANTS: dict[str, Any] = {"baseline": {}, "sigma": {"sigma_reparam": {"enabled": True}}}


def program(**changes: Any) -> Program:
    whole: dict[str, Any] = {
        "command": ("train.py",), "arguments": ("--config=b.yaml",), "subcommands": True, "methods_are_keys": False,
        "config": CONFIG,
    }  # fmt: skip
    return Program(**{**whole, **changes})


def todo(out: Path, **changes: Any) -> list[Job]:
    runs = plan(VARIANTS, [0, 1], out)
    check(runs, program())
    return jobs(runs, program(), **{"test": False, "retry_failed": False, "checkpoint_every": 1.0, **changes})


def names(found: list[Job], out: Path) -> list[str]:
    return [str(Path(one.folder).relative_to(out)) for one in found]


def test_what_is_left(tmp_path: Path) -> None:
    first = todo(tmp_path)
    everything = ["baseline/seed_0", "sigma/seed_0", "baseline/seed_1", "sigma/seed_1"]
    assert names(first, tmp_path) == everything
    assert first[1].environment == {"LIGHTNING_EFFICIENT": str(tmp_path / "sigma/seed_0/methods.yaml")}
    assert first[0].environment == {"LIGHTNING_EFFICIENT": ""}
    assert all("--ckpt_path" not in " ".join(one.steps["fit"]) for one in first)

    states = {
        "baseline/seed_0": "finished",
        "sigma/seed_0": "failed",
        "baseline/seed_1": "running",
        "sigma/seed_1": "killed",
    }
    for name, state in states.items():
        done = ["fit"] * (state == "finished")
        write_json(tmp_path / name / STATUS, {"state": state, "done": done, "attempts": 1, "seconds": 1.0})
    (tmp_path / "sigma/seed_1/broken.ckpt").write_bytes(b"PK\3\4 cut off")
    (tmp_path / "baseline/seed_1/x.txt").write_text("of the killed attempt", encoding="utf-8")
    torch_file(tmp_path / "sigma/seed_1" / CHECKPOINT)
    left = todo(tmp_path)
    assert names(left, tmp_path) == ["baseline/seed_1", "sigma/seed_1"]
    assert not (tmp_path / "baseline/seed_1/x.txt").exists(), "without a checkpoint a run starts anew"
    assert left[1].steps["fit"][-1] == f"--ckpt_path={tmp_path / 'sigma/seed_1' / CHECKPOINT}"
    assert names(todo(tmp_path, retry_failed=True), tmp_path) == everything[1:]
    tests = todo(tmp_path, test=True)
    assert list(tests[0].steps) == ["test"]
    write_json(tmp_path / "baseline/seed_0" / PROGRESS, {"has_test": False})
    assert names(todo(tmp_path, test=True), tmp_path)[0] != "baseline/seed_0"


def torch_file(path: Path) -> None:
    import torch

    torch.save({"a": 1}, path)


def test_other_inputs_are_refused_before_anything_changes(tmp_path: Path) -> None:
    todo(tmp_path)
    runs = plan(VARIANTS, [0], tmp_path)
    changed = {"trainer": {"max_epochs": 5, "logger": None}, "model": {"lr": 0.1, "width": 3}}
    with pytest.raises(
        ValueError, match=r"`trainer.max_epochs` was 2, is 5; `model.width` was null, is 3.*another `out`"
    ):
        check(runs, program(config=changed))
    other = plan({"sigma": {"sigma_reparam": {"enabled": True, "init": "one"}}}, [0], tmp_path)
    with pytest.raises(ValueError, match=r"`methods.sigma_reparam.init` was null, is \"one\""):
        check(other, program())
    foreign = tmp_path / "mine" / "seed_0"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="holds files that `ablate` did not write"):
        check(plan({"mine": {}}, [0], tmp_path), program())


def test_command_lines(tmp_path: Path) -> None:
    folder, methods = tmp_path / "sigma" / "seed_3", VARIANTS["sigma"]
    argv = program().argv("fit", folder, methods, 3, Path("c.ckpt"))
    assert argv[:3] == ("train.py", "fit", "--config=b.yaml")
    assert {"--seed_everything=3", "--ckpt_path=c.ckpt", f"--trainer.default_root_dir={folder}"} <= set(argv)
    keys = program(methods_are_keys=True)
    assert f"--config={folder / 'methods.yaml'}" in keys.argv("fit", folder, methods, 3)
    assert keys.environment(folder, methods) == {"LIGHTNING_EFFICIENT": ""}
    bare = program(subcommands=False).argv("fit", folder, methods, 3, Path("c.ckpt"))
    assert bare[1] == "--config=b.yaml"
    assert not any("ckpt" in word for word in bare)


def test_options_of_a_variant_come_after_those_of_every_run(tmp_path: Path) -> None:
    small: Any = {"config": {"model.width": 8}}
    argv = program(methods_are_keys=True).argv("fit", tmp_path, small, 3)
    assert argv[2:4] == ("--config=b.yaml", "--model.width=8")
    assert program().environment(tmp_path, small) == {"LIGHTNING_EFFICIENT": ""}
    both = small | VARIANTS["sigma"]
    assert f"--config={tmp_path / 'methods.yaml'}" in program(methods_are_keys=True).argv("fit", tmp_path, both, 3)
    (job,) = jobs(plan({"both": both}, [0], tmp_path), program(), False, False, 1.0)
    assert yaml.safe_load(Path(job.environment["LIGHTNING_EFFICIENT"]).read_text("utf-8")) == VARIANTS["sigma"]
    check(plan({"both": both}, [0], tmp_path), program())
    other = both | {"config": {"model.width": 4}}
    with pytest.raises(ValueError, match=r"`methods.config.model.width` was 8, is 4"):
        check(plan({"both": other}, [0], tmp_path), program())


def test_loggers_of_the_user_stay(tmp_path: Path) -> None:
    folder = tmp_path / "sigma" / "seed_3"
    board, csv, other = (
        f"lightning.pytorch.loggers.{name}" for name in ("TensorBoardLogger", "CSVLogger", "WandbLogger")
    )
    given = [
        {"class_path": csv, "init_args": {"save_dir": "here", "flush_logs_every_n_steps": 5}},
        {"class_path": other, "init_args": {"project": "p"}},
        {"class_path": board, "init_args": {"save_dir": "there", "log_graph": True}},
    ]
    place = {"save_dir": str(tmp_path), "name": "sigma", "version": "seed_3", "default_hp_metric": False}
    assert loggers({"trainer": {"logger": given}}, folder, "fit") == [
        {"class_path": board, "init_args": {**place, "log_graph": True, "sub_dir": None}},
        {
            "class_path": csv,
            "init_args": {"save_dir": str(folder), "name": "", "version": "csv", "flush_logs_every_n_steps": 5},
        },
        given[1],
    ]
    for nothing in (None, True, False):
        assert loggers({"trainer": {"logger": nothing}}, folder, "fit") == [{"class_path": board, "init_args": place}]


def test_a_missing_script() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no script 'nowhere/train\.py': neither a file nor an importable module"
    ):
        find_program("nowhere/train.py", [], Asked())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('training for hours')", "printed no configuration: `ablate` runs LightningCLI scripts"),
        (
            "raise SystemExit('usage: x\\nx: error: no key model.widht')",
            r"would not start:\nx: error: no key model.widht$",
        ),
        (
            "import sys\nint(sys.argv[1])",
            "(?s)with base 10: 'fit'.*as LightningCLI scripts tell it. Run another",
        ),
    ],
)
def test_scripts_that_are_refused(tmp_path: Path, script: str, message: str) -> None:
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    with Asked() as asked, pytest.raises(ValueError, match=message):
        find_program(tmp_path / "train.py", [], asked)


def test_a_program_for_any_model_is_told_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "print('# lightning.pytorch==2\\ntrainer: {}\\nmodel: null\\n')", encoding="utf-8"
    )
    with (
        Asked() as asked,
        pytest.raises(ValueError, match=r"none is named. Add -c CONFIG with `model:` in it, or -- --m"),
    ):
        find_program(tmp_path / "train.py", [], asked)


def test_what_a_run_is_told(tmp_path: Path) -> None:
    (first, *_) = todo(tmp_path, export=True)
    run_job(Job(first.folder, {"fit": ["-c", "import os; print(os.environ['LIGHTNING_EFFICIENT_RUN'])"]}, {},
                first.cwd, first.checkpoint_every, first.export))  # fmt: skip
    told = json.loads((Path(first.folder) / LOG).read_text(encoding="utf-8").splitlines()[1])
    assert told == {
        "folder": first.folder,
        "checkpoint_every": 1.0,
        "export": True,
        "latency": False,
        "parent": os.getpid(),
    }


@pytest.mark.forks
def test_the_lock_is_held_by_children_of_a_killed_command(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=rf"another `ablate` \(process {os.getpid()}\) works in"),
        locked(tmp_path),
    ):
        pass
    if not (killed := os.fork()):
        with locked(tmp_path) as lock:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"], pass_fds=[lock])
            os._exit(0)
    os.waitpid(killed, 0)
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started > 0.5, "the child still held it"


# -- what people see


def test_error_lines() -> None:
    chain = (
        'noise\nTraceback (most recent call last):\n  File "a.py", line 1, in f\n    x\nKeyError: 1\n\nThe above\n\n'
    )
    chain += 'Traceback (most recent call last):\n  File "b.py", line 7, in g\n    y\nValueError: first\n  second\n'
    assert error_lines(chain) == 'ValueError: first\n  second\nFile "b.py", line 7, in g'
    assert (
        error_lines("usage: a lot\ntip: x\nerror: Group 'model' does not\n  accept")
        == "error: Group 'model' does not\n  accept"
    )
    assert error_lines("\n".join(map(str, range(30)))).splitlines() == [str(i) for i in range(18, 30)]
    assert error_lines("") == "it wrote nothing"


def test_the_table(tmp_path: Path) -> None:
    todo(tmp_path)
    runs = plan(VARIANTS, [0, 1], tmp_path)
    write_json(
        runs[0].folder / STATUS, {"state": "running", "started": time.time() - 70, "seconds": 10.0, "attempts": 2}
    )
    progress = {
        "epoch": 1,
        "epochs": 4,
        "step": 9,
        "steps": None,
        "seconds_left": 200.0,
        "metrics": {"val_acc": 0.12345},
    }
    write_json(runs[0].folder / PROGRESS, progress)
    write_json(runs[1].folder / STATUS, {"state": "failed", "error": "OSError: x\nat y", "attempts": 1, "seconds": 1.0})
    rows = [row_of(run) for run in runs]
    metric = shown_metric(rows, None)
    assert metric == "val_acc"
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    console.print(table(rows, metric))
    line = next(line for line in screen.getvalue().splitlines() if "running" in line)
    assert [word for word in line.split() if word != "│"] == [
        "baseline",
        "0",
        "running",
        "1/4",
        "9",
        "0.1235",
        "1:20",
        "3:20",
    ]
    assert "1 running" in screen.getvalue()
    assert errors(rows) == [f"sigma, seed 0: OSError: x\nat y\n  log: {runs[1].folder}/log.txt"]
    console.print(table(rows, metric, height=2))
    assert screen.getvalue().rpartition("variant")[2].count("waiting") == 1, "in the caption only"
    view = View(console, None)
    view.update(rows[:1])
    write_json(runs[0].folder / STATUS, {"state": "finished", "seconds": 81.0, "attempts": 2})
    view.update([row_of(runs[0])])
    assert screen.getvalue().endswith("baseline seed 0: finished after 1:21, val_acc 0.1235  [1 of 1 finished]\n")
    assert [duration(s) for s in (0.4, 59.4, 60, 3725)] == ["0 s", "59 s", "1:00", "1:02:05"]


def test_what_did_not_start_alike_is_said(tmp_path: Path) -> None:
    runs = plan({"baseline": {}, "a": {}, "b": {}}, [0, 1], tmp_path)

    def start(index: int, weights: str, *batches: str) -> None:
        runs[index].folder.mkdir(parents=True, exist_ok=True)
        start = {"weights": {"w": weights}, "batches": {str(i): text for i, text in enumerate(batches)}}
        (runs[index].folder / START).write_text(json.dumps(start), encoding="utf-8")

    start(0, "w0", "x", "y")
    assert started_alike(runs) == []
    start(1, "w0", "x")
    alike = "Every variant started from the baseline's weights and saw the same batches, seed by seed."
    assert started_alike(runs) == [alike]
    start(1, "w0", "x", "z")
    start(2, "other", "x", "y")
    start(3, "w0", "x", "y")
    assert started_alike(runs) == [
        "Seeds 0 and 1 gave the same weights and batches: does the script seed itself? They are one.",
        "Not as in the baseline of the same seed: first batch of epoch 1: a seed 0.",
        "Not as in the baseline of the same seed: initial weights: b seed 0.",
    ]
