"""A forked run is what a fresh one is: arguments, surroundings, ends; and it never outlives who started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_efficient.ablation.asking import Asked
from lightning_efficient.ablation.engines import LocalEngine
from lightning_efficient.ablation.files import LOG, STATUS, read_json
from lightning_efficient.ablation.job import Job, run_job
from lightning_efficient.ablation.starters import FreshStarter, Warm, WarmStarter

DONE = "import json; json.dump({'fitted': True}, open('progress.json', 'w'))\n"
WAITS = "import os, time; open('pids', 'w').write(f'{os.getpid()} {os.getppid()} .'); time.sleep(60)"
ASKED = """
import json, os, sys
open("parent", "w").write(str(os.getppid()))
json.asked = getattr(json, "asked", 0) + 1
print(sys.argv[1], json.asked)
assert "probe" in os.environ["LIGHTNING_EFFICIENT_RUN"]
if sys.argv[1] == "bad":
    sys.exit("asked: error: bad")
"""


def job(folder: Path, code: str) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_it.py").write_text(code, encoding="utf-8")
    return Job(str(folder), {"fit": ["-m", "run_it", "--seed=1"]}, {"MINE": "1"}, str(folder), 0.0)


def alive(process: int) -> bool:  # rather than gone, or a zombie that nobody has reaped yet
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    """Of a run that waits, and of its parent; none before they are known."""
    file = folder / "pids"
    words = file.read_text(encoding="utf-8").split() if file.exists() else []
    return list(map(int, words[:2])) if len(words) == 3 else []


@pytest.fixture
def warm() -> Iterator[WarmStarter]:
    with Warm(["numpy"], {"SLOT": "a"}) as process:
        yield WarmStarter(process)


def test_a_forked_run_sees_what_a_fresh_one_sees(tmp_path: Path, warm: WarmStarter) -> None:
    code = DONE + (
        "import os, sys, __main__\n"
        "print('printed'); print('told', file=sys.stderr)\n"
        "seen = {'argv': sys.argv[1:], 'name': __name__, 'module': __main__.__spec__.name, 'path': sys.path[0],\n"
        "        'file': __main__.__file__, 'cwd': os.getcwd(), 'mine': os.environ['MINE'], 'in': sys.stdin.read(),\n"
        "        'leads': os.getpgrp() == os.getpid(), 'threads': len(os.listdir('/proc/self/task')),\n"
        "        'parent': json.loads(os.environ['LIGHTNING_EFFICIENT_RUN'])['parent'] == os.getppid(),\n"
        "        'variables': sorted(set(os.environ) - {'PWD', 'OLDPWD', '_', 'SHLVL'})}\n"
        "json.dump(seen, open('seen.json', 'w'))\n"
        "import atexit; atexit.register(print, 'last words')\n"
    )
    seen = []
    for name, starter in (("fresh", FreshStarter()), ("warm", warm)):
        run_job(job(tmp_path / name, code), environment={"SLOT": "a"}, starter=starter)
        assert read_json(tmp_path / name / STATUS)["state"] == "finished"
        text = (tmp_path / name / LOG).read_text(encoding="utf-8")
        assert text.splitlines()[1:] == ["printed", "told", "last words"]
        seen.append(json.loads((tmp_path / name / "seen.json").read_text().replace(str(tmp_path / name), "")))
    assert seen[0] == seen[1]
    assert seen[0]["leads"]
    assert seen[0]["parent"]


@pytest.mark.parametrize(
    ("code", "state", "error"),
    [
        ("raise ValueError('no such thing')", "failed", "ValueError: no such thing"),
        ("import sys; sys.exit('x: error: bad key')", "failed", "x: error: bad key\n(exit code 1)"),
        ("import sys; sys.exit(2)", "failed", "exit code 2"),
        ("import os; os.abort()", "failed", "ended by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "killed by SIGKILL"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); import time; time.sleep(60)", "killed", "SIGKILL"),
    ],
)
def test_how_a_forked_run_ends_and_the_next_one_goes_on(
    tmp_path: Path, warm: WarmStarter, code: str, state: str, error: str
) -> None:
    """Also when it takes the process that forks with it."""
    run_job(job(tmp_path / "a", code), starter=warm)
    run_job(job(tmp_path / "b", DONE), starter=warm)
    status = read_json(tmp_path / "a" / STATUS)
    assert status["state"] == state
    assert error in status["error"]
    assert read_json(tmp_path / "b" / STATUS)["state"] == "finished"


def test_runs_draw_different_random_numbers(tmp_path: Path, warm: WarmStarter) -> None:
    code = DONE + "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = set()
    for name in "ab":
        run_job(job(tmp_path / name, code), starter=warm)
        drawn |= set((tmp_path / name / LOG).read_text(encoding="utf-8").splitlines()[-1].split())
    assert len(drawn) == 4


def test_stopping_ends_the_run_and_the_process_that_forked_it(tmp_path: Path) -> None:
    with Warm(["json"], {}) as process:
        engine = LocalEngine([{}], WarmStarter(process))
        engine.start([job(tmp_path, WAITS)])
        until(lambda: pids(tmp_path))
        engine.stop()
    assert read_json(tmp_path / STATUS)["state"] == "interrupted"
    assert not any(map(alive, pids(tmp_path)))


def test_one_process_forks_into_runs_that_go_on_at_the_same_time(tmp_path: Path) -> None:
    with Warm(["json"], {}) as process:
        engine = LocalEngine([{"SLOT": "a"}, {"SLOT": "b"}], WarmStarter(process))
        engine.start([job(tmp_path / "a", WAITS), job(tmp_path / "b", WAITS), job(tmp_path / "c", DONE)])
        until(lambda: pids(tmp_path / "a") and pids(tmp_path / "b"))
        (first, parent), (second, other) = pids(tmp_path / "a"), pids(tmp_path / "b")
        assert parent == other == process.pid
        os.kill(first, signal.SIGKILL)
        until(lambda: read_json(tmp_path / "c" / STATUS).get("state") == "finished")
        assert alive(second)
        engine.stop()
    states = [read_json(tmp_path / name / STATUS)["state"] for name in "ab"]
    assert states == ["killed", "interrupted"]


def test_a_fork_keeps_what_it_inherits_open_and_nothing_else(tmp_path: Path) -> None:
    """The lock on the output folder: not the process that forks holds it, which may outlive the lock by seconds."""
    code = DONE + "import os; print(*sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')\n"
    code += "                            if os.path.exists(f'/proc/self/fd/{n}')))"
    with (tmp_path / "lock").open("w") as lock, Warm(["json"], {}) as process:
        run_job(job(tmp_path / "a", code), starter=WarmStarter(process, [lock.fileno()]))
        held = {os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()}
    folder = tmp_path.resolve()
    open_files = (folder / "a" / LOG).read_text(encoding="utf-8").splitlines()[1].split()
    assert open_files == sorted([*[str(folder / "a" / LOG)] * 2, str(folder / "lock"), "/dev/null"])
    assert str(folder / "lock") not in held


def test_questions_are_answered_by_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees a process as it was after the imports; what it prints and how it ends is told apart."""
    (tmp_path / "asked.py").write_text(ASKED, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Warm(["json"], {}) as process, Asked(process) as asked:
        answers = [asked.ask(["-m", "asked", word]) for word in ("good", "μ", "bad")]
        assert [(done.stdout, done.returncode) for done in answers] == [("good 1\n", 0), ("μ 1\n", 0), ("bad 1\n", 1)]
        assert [done.stderr for done in answers] == ["", "", "asked: error: bad\n"]
    assert not alive(int((tmp_path / "parent").read_text()))


def test_when_who_asked_is_killed_the_run_and_the_process_that_forks_end(tmp_path: Path) -> None:
    job(tmp_path, WAITS)
    code = (
        "import sys; from lightning_efficient.ablation.job import Job, run_job\n"
        "from lightning_efficient.ablation.starters import Warm, WarmStarter\n"
        "job = Job(sys.argv[1], {'fit': ['-m', 'run_it']}, {}, sys.argv[1], 0.0)\n"
        "run_job(job, starter=WarmStarter(Warm(['json'], {})))"
    )
    asks = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    until(lambda: pids(tmp_path))
    asks.kill()
    asks.wait()
    until(lambda: not any(map(alive, pids(tmp_path))))


def test_what_cannot_be_imported_fails_every_run(tmp_path: Path) -> None:
    with Warm(["no_such_module"], {}) as process:
        for name in "ab":
            run_job(job(tmp_path / name, DONE), starter=WarmStarter(process))
            status = read_json(tmp_path / name / STATUS)
            assert status["state"] == "failed"
            assert "No module named 'no_such_module'" in status["error"]
