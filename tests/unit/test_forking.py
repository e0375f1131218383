"""The helper that runs scripts in forks: how a script can end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forking import forked

pytestmark = pytest.mark.forks


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(
        "import os, sys, time\n"
        "rank = os.environ.get('RANK', 'none')\n"
        "print(__name__, rank, os.environ.get('WORLD_SIZE'), *sys.argv[1:], flush=True)\n"
        "exec(sys.argv[1])\n"
    )
    return path


def test_what_a_script_sees_and_leaves(script: Path) -> None:
    assert forked(script, "pass", 3) == (0, "__main__ none None pass 3\n")
    assert "RANK" not in os.environ
    assert forked(script, "pass", processes=2) == (0, "__main__ 0 2 pass\n__main__ 1 2 pass\n")


def test_how_it_can_fail(script: Path) -> None:
    code, output = forked(script, "raise KeyError('no such thing')")
    assert code == 1
    assert output.endswith("KeyError: 'no such thing'\n")
    assert forked(script, "sys.exit(3)").code == 3
    assert forked(script, "sys.exit()").code == 0
    code, output = forked(script, "sys.exit('a reason')")
    assert (code, output.splitlines()[-1]) == (1, "a reason")
    assert forked(script, "os.kill(os.getpid(), 9)").code == -signal.SIGKILL
    # one fails, the other waits for it: for ever, were it not ended
    start = time.monotonic()
    assert forked(script, "time.sleep(60) if rank == '0' else sys.exit(4)", processes=2).code == 4
    assert time.monotonic() - start < 30


def test_time_is_up(script: Path) -> None:
    start = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    with pytest.raises(pytest.fail.Exception, match=r"script\.py was not done after 0\.5 s") as failure:
        forked(script, start, seconds=0.5)
    grandchild = int(str(failure.value).split()[-1])
    for _ in range(100):  # init, or whoever stands in for it, clears up what nobody waits for
        state = Path(f"/proc/{grandchild}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("what the script had started goes on")
