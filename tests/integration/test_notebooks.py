"""Every notebook runs from top to bottom, and what is committed of it says nothing about the machine it ran on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  # once, for all notebooks; so are the two below
import nbformat
import pytest
import sklearn.datasets  # noqa: F401
from forking import forked
from IPython.core import interactiveshell  # noqa: F401

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SCRIPT = Path(__file__).parent / "scripts" / "notebook.py"
MACHINE = re.compile(r"(?:^|[\s\"'(=:])/(?:root|home|Users|tmp|work|opt|usr|private|var)/|[A-Z]:\\\\|site-packages")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def tail(test: str, cell: dict[str, Any]) -> bool:
    """What trains two runs to compare them, which the tour does as well: test_demo.py."""
    return test == "test_notebook_runs" and cell["path"].stem == "comparing_runs"


@pytest.mark.slow
@pytest.mark.forks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    """By IPython in a fork: a kernel of its own would import everything once more."""
    code, output = forked(SCRIPT, path, tmp_path, seconds=900)
    assert code == 0, output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_names_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        for text in (cell.source, *map(str, cell.get("outputs", []))):
            assert not (found := MACHINE.search(text)), text[max(0, found.start() - 80) : found.end() + 80]
