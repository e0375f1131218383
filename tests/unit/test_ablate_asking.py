"""A script is asked about all variants in one process, and what it says is what it says in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.program import check_variants, find_program
from lightning_efficient.ablation.variants import read_variants

# Stands for a LightningCLI script, as far as `--print_config` shows one: it notes each process that it runs in.
SCRIPT = """
import os, pathlib, sys
here = pathlib.Path(__file__).resolve().parent
with (here / "asked").open("a") as file:
    print(os.getpid(), *sys.argv[1:], file=file)
if sys.argv[1] == "fit":
    sys.exit("usage: train.py\\ntrain.py: error: unrecognized arguments: fit")
if wrong := [word for word in sys.argv if "widht" in word]:
    sys.exit(f"train.py: error: no option {wrong[0]}")
MORE
print("# lightning.pytorch==2.6.6\\ntrainer: {max_epochs: 3}\\nmodel: {width: 8}")
"""
VARIANTS = {f"width{width}": {"config": {"model.width": width}} for width in (16, 32, 64)}
OPTIONS = ["--model.width=16", "--model.width=32", "--model.width=64"]


def script(folder: Path, more: str = "") -> Path:
    path = folder / "train.py"
    path.write_text(SCRIPT.replace("MORE", more), encoding="utf-8")
    return path


def questions(folder: Path) -> tuple[list[str], list[str]]:
    lines = [line.split(maxsplit=1) for line in (folder / "asked").read_text("utf-8").splitlines()]
    return [process for process, _ in lines], [words for _, words in lines]


def test_one_process_answers_for_all_variants(tmp_path: Path) -> None:
    with Asked() as asked:
        program = find_program(script(tmp_path), ["--lr=1"], asked)
        assert check_variants(read_variants(VARIANTS), program, asked) == []
    processes, words = questions(tmp_path)
    assert (program.subcommands, program.config) == (False, {"trainer": {"max_epochs": 3}, "model": {"width": 8}})
    assert words[:2] == ["fit --lr=1 --print_config", "--lr=1 --print_config"]
    begins = ["--lr=1 --seed_everything=0", *(f"--lr=1 {option} --seed_everything=0" for option in OPTIONS)]
    assert [line.startswith(begin) for line, begin in zip(words[2:], begins, strict=True)] == [True] * 4
    assert len(set(processes)) == 1
    assert not Path(f"/proc/{processes[0]}").exists(), "it ends with the questions"


@pytest.mark.parametrize(
    "more",
    [
        "if hasattr(sys, 'mine'): raise RuntimeError('context has already been set')\nsys.mine = 1",
        "if hasattr(sys, 'mine'): os._exit(3)\nsys.mine = 1",
        "print('# lightning.pytorch==2\\ntrainer: {}', flush=True); os._exit(0)",
        "os.chdir('/'); os.environ['MINE'] = os.environ.get('MINE', '') + '1'; assert os.environ['MINE'] == '1'\n"
        "sys.path.insert(0, 'mine'); assert sys.path.count('mine') == 1",
        "sys.stdin.read()",
        "sys.stdout.close(); sys.stdout = open(1, 'w', closefd=False)",
    ],
    ids=["state", "exit", "ends", "surroundings", "reads", "closes"],
)
def test_scripts_that_run_once_a_process(tmp_path: Path, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script(tmp_path, more)
    with Asked() as asked:
        program = find_program("train.py", [], asked)
        assert check_variants(read_variants(VARIANTS), program, asked) == []


@pytest.mark.parametrize("more", ["", "if len(sys.argv) > 2: raise KeyError('no data here')", "os._exit(7)"])
def test_it_is_refused_as_in_a_process_of_its_own(tmp_path: Path, more: str) -> None:
    command = [str(script(tmp_path, more)), "--widht=3" if not more else "--width=3", "--print_config"]
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    with Asked() as asked:
        asked.ask([command[0], "--print_config"])
        done = asked.ask(command)
    assert (done.returncode, done.stdout) == (alone.returncode, alone.stdout)
    assert done.returncode
    assert done.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_modules_are_run_as_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("from package import said\nprint(said.TEXT)", encoding="utf-8")
    (tmp_path / "package" / "said.py").write_text("TEXT = 'μ → 1'", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Asked() as asked:
        assert [asked.ask(["-m", "package"]).stdout for _ in range(2)] == ["μ → 1\n"] * 2


def test_variants_without_options_start_as_the_baseline_does(tmp_path: Path) -> None:
    with Asked() as asked:
        program = find_program(script(tmp_path), [], asked)
        check_variants(read_variants(["sigma_reparam", "norm_swap"]), program, asked)
    assert len(questions(tmp_path)[0]) == 3
