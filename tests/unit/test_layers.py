"""The house rules that a machine can check: imports point one way, the core is free of lightning, files stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_efficient

PACKAGE = "lightning_efficient"
ROOT = Path(lightning_efficient.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The house, lowest room first: a room imports from those before it and from itself, never from one behind it. The five
# modules at the top stand above the core (`functional`), above `deploy` (`export`) or above all (the public names, the
# switch).
ROOMS = (
    "common", "metrics", "surgery", "weightspace", "folding", "norms", "attention", "pruning", "structured",
    "companions", "loops", "trainer", "lifecycle", "callbacks", "deploy", "comparison", "ablation", "tuning", "testing",
    "demo", "cli",
)  # fmt: skip
LEVEL = {name: level for level, name in enumerate(ROOMS)}
ABOVE = {
    "functional": LEVEL["tuning"], "export": LEVEL["comparison"], "_switch": len(ROOMS), "__main__": len(ROOMS),
    "": len(ROOMS) + 1,
}  # fmt: skip
CORE = {*ROOMS[: ROOMS.index("trainer")], "functional"}  # torch only, never lightning
LONGEST = 400
PICKLERS = ("pickle", "cloudpickle", "dill", "marshal", "shelve")


def segment(module: str) -> str:
    """``lightning_efficient.lifecycle.base`` -> ``callbacks``; the package itself -> ``""``."""
    return (module.split(".") + [""])[1]


def module_of(path: Path) -> str:
    parts = (PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every imported module or name, dotted and absolute, wherever in the file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package and node.level == 1 else -max(node.level - is_package, 0)]
            base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def upward(module: str, imported: str) -> bool:
    """Whether a module of this package imports from a higher layer."""
    return imported.split(".")[0] == PACKAGE and level(imported) > level(module)


def level(module: str) -> int:
    return (LEVEL | ABOVE).get(segment(module), ABOVE[""])  # what is no module is a public name


def type_only(tree: ast.Module) -> ast.Module:
    """The file without its ``if TYPE_CHECKING:`` blocks, which import nothing when it runs."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            is_guard = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return node.orelse if is_guard else self.generic_visit(node)

    return Strip().visit(tree)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_every_room_is_on_the_list() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT}
    assert rooms == set(ROOMS)
    assert {path.stem for path in FILES if path.parent == ROOT} == {"__init__", *ABOVE} - {""}
    public = {cls for cls, home in lightning_efficient._HOMES.items() if home.startswith("callbacks.")}
    homes = {home for home in lightning_efficient._HOMES.values() if home.startswith("callbacks.")}
    files = {f"callbacks.{path.stem}" for path in FILES if path.parent == ROOT / "callbacks"}
    assert files - {"callbacks.__init__"} == homes, f"callbacks/ holds the public callbacks {public} and nothing else"


def test_contributors_are_told_the_same_order() -> None:
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == ROOMS


def test_no_import_circles() -> None:
    """Modules of one room may not wait for each other either."""
    graph: dict[str, set[str]] = {}
    modules = {module_of(path) for path in FILES}
    for path in FILES:
        module = module_of(path)
        names = [n for n, _ in imports(type_only(parse(path)), module, path.name == "__init__.py")]
        targets = {next((m for m in (n, n.rpartition(".")[0]) if m in modules), "") for n in names}
        graph[module] = targets - {"", module, PACKAGE}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_the_rules(path: Path) -> None:
    module = module_of(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    running = imports(type_only(parse(path)), module, path.name == "__init__.py")
    assert [f"{n} (line {i})" for n, i in running if upward(module, n)] == []
    names = list(imports(parse(path), module, path.name == "__init__.py"))
    if segment(module) in CORE:
        assert [f"{n} (line {i})" for n, i in names if n.split(".")[0] in ("lightning", "pytorch_lightning")] == []
    assert [f"{n} (line {i})" for n, i in names if forbidden_import(n)] == []
    assert [f"{n} (line {i})" for n, i in forbidden_calls(parse(path))] == []


def forbidden_import(name: str) -> bool:
    first, *rest = name.split(".")
    if first in PICKLERS and rest:
        return not rest[-1].endswith("Error")
    return first in ("lightning", "pytorch_lightning") and any(part.startswith("_") for part in rest)


def forbidden_calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Uses of builtins that execute text, and of loaders that execute a file; naming their errors is fine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in PICKLERS:
            yield from [(ast.unparse(node), node.lineno)] * (not node.attr.endswith("Error"))
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
            yield node.func.id, node.lineno
        for keyword in node.keywords:
            if keyword.arg == "weights_only" and getattr(keyword.value, "value", None) is False:
                yield "weights_only=False", node.lineno


# -- the rules themselves can fail


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lightning_efficient.deploy.export import export", ["lightning_efficient.deploy.export.export"]),
        ("def f():\n  import lightning_efficient.cli", ["lightning_efficient.cli"]),
        ("from ..callbacks import base", ["lightning_efficient.callbacks.base"]),
        ("from .. import cli", ["lightning_efficient.cli"]),
        ("from lightning_efficient import anything_new", ["lightning_efficient.anything_new"]),
        ("import lightning_efficient", ["lightning_efficient"]),
        ("from . import sigma_reparam\nfrom .x import y", []),
        ("from lightning_efficient.common.match import covers", []),
        ("if TYPE_CHECKING:\n  from lightning_efficient.deploy.export import export", []),
    ],
)
def test_upward_imports_are_found(source: str, found: list[str]) -> None:
    module = "lightning_efficient.norms.some"
    names = [name for name, _ in imports(type_only(ast.parse(source)), module, is_package=False)]
    assert [name for name in names if upward(module, name)] == found


def test_relative_imports_of_packages() -> None:
    tree = ast.parse("from .x import y\nfrom ..lifecycle.recipe import z")
    assert [n for n, _ in imports(tree, "lightning_efficient.norms", is_package=True)] == [
        "lightning_efficient.norms.x.y",
        "lightning_efficient.lifecycle.recipe.z",
    ]


@pytest.mark.parametrize(
    "name", ["pickle.loads", "marshal.load", "lightning.pytorch.utilities._pytree", "lightning.x._y"]
)
def test_forbidden_imports_are_found(name: str) -> None:
    assert forbidden_import(name)
    assert not forbidden_import("lightning.pytorch.utilities.rank_zero")
    assert not forbidden_import("pickle.UnpicklingError")


@pytest.mark.parametrize("source", ["eval('1')", "exec('1')", "torch.load(p, weights_only=False)", "pickle.loads(b)"])
def test_forbidden_calls_are_found(source: str) -> None:
    assert list(forbidden_calls(ast.parse(source)))
    assert not list(forbidden_calls(ast.parse("model.eval(); torch.load(p, weights_only=True); pickle.PickleError")))
