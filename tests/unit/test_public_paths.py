"""What users read names public paths only: no docs, notebook or public docstring sends them into a room."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_efficient

ROOT = Path(__file__).parents[2]
PACKAGE = Path(lightning_efficient.__file__).parent
PUBLIC = {
    name: importlib.import_module(f"lightning_efficient.{name}")
    for name in ("demo", "export", "functional", "metrics", "testing", "tuning")
}
ENTRY_POINTS = "lightning_efficient.methods"  # no module: the group in which other packages name theirs
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb"), ROOT / "mkdocs.yml"]
)


def deep(text: str) -> list[str]:
    """Paths into the package that are not public, however they are written."""
    dotted = re.findall(r"\blightning_efficient(?:\.\w+)+", text)
    for module, names in re.findall(r"from (lightning_efficient[\w.]*) import (\([^)]*\)|[^\n]+)", text):
        dotted += [f"{module}.{name}" for name in re.findall(r"(\w+)(?: as \w+)?", names.partition("#")[0])]
    found = {path for path in dotted if path != ENTRY_POINTS and not public(path.split(".")[1:])}
    found |= {path for path in re.findall(r"`(\w+(?:\.\w+)+)\b", text) if in_a_room(path.split("."))}
    return sorted(found)


def public(parts: list[str]) -> bool:
    first, *rest = parts
    if first in PUBLIC:
        return not rest or rest[0] in PUBLIC[first].__all__
    return first in lightning_efficient.__all__


def in_a_room(parts: list[str]) -> bool:
    """Such as ``lifecycle.cuts.cut``, the package's name left out, of today or of an older layout."""
    is_room = (
        (PACKAGE / parts[0]).is_dir() and parts[0] not in PUBLIC and parts[0] != "trainer" and parts[1].isidentifier()
    )
    return is_room or (PACKAGE / parts[0] / f"{parts[1]}.py").exists()


def cells(path: Path) -> str:
    text = path.read_text("utf-8")
    return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"]) if path.suffix == ".ipynb" else text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_public_paths_only(path: Path) -> None:
    assert deep(cells(path)) == []


def docstrings() -> Iterator[tuple[str, str]]:
    for module in (lightning_efficient, *PUBLIC.values()):
        for name in module.__all__:
            thing = getattr(module, name)
            yield name, getattr(thing, "__doc__", None) or ""
            if isinstance(thing, type):
                own = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
                yield from ((f"{name}.{k}", getattr(v, "__doc__", None) or "") for k, v in own.items())


def test_public_docstrings_name_public_paths_only() -> None:
    assert {name: paths for name, text in docstrings() if (paths := deep(text))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from lightning_efficient.lifecycle.cuts import cut", 2),
        ("import lightning_efficient.callbacks", 1),
        ("from lightning_efficient import export, METHODS", 1),
        ("from lightning_efficient.metrics import (\n    Sparsity,\n    Gone,\n)", 1),
        ("`lifecycle.cuts.cut`", 1),
        ("from lightning_efficient import export as e, ablate  # both", 0),
        ("`lightning_efficient.testing.assert_method_contract`, `trainer.fit`, `norms.0`", 0),
    ],
)
def test_deep_paths_are_found(text: str, found: int) -> None:
    assert len(deep(text)) == found
