"""The package imports on Windows, and what works on POSIX systems only is refused there by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from forking import forked

import lightning_efficient

SCRIPT = Path(__file__).parent / "scripts" / "on_windows.py"


@pytest.mark.forks
def test_every_module_imports_and_ablate_is_refused_by_name(tmp_path: Path) -> None:
    code, output = forked(SCRIPT)
    assert code == 0, output
    files = list(Path(lightning_efficient.__file__).parent.rglob("*.py"))
    modules, refused = output.splitlines()[-2:]
    assert modules == f"{len(files) - 2} modules"  # the package itself was there, `__main__` would run
    assert "`ablate` needs POSIX" in refused
    assert "WSL" in refused
