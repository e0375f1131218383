"""What lies beside the weights of a model whose widths its config cannot say: the code that builds it.

A folder of Hugging Face's may hold a class of its own. This one is the library's class, which then takes the sizes and
the numbers that the config lists under ``cut``: ``AutoModel...from_pretrained(folder, trust_remote_code=True)`` builds
the smaller model without this package. A loader that does not run the code stops at the first size that is another.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lightning_efficient.common.match import modules_by_name
from lightning_efficient.common.saving import save_besides
from lightning_efficient.structured.cuts import held_numbers, tensors_by_name
from lightning_efficient.structured.pretrained import REFUSED, build_from_config

CODE = "modeling_cut.py"
_SOURCE = '''"""{name} as wide as pruning has left it: `{auto}.from_pretrained(folder, trust_remote_code=True)`."""

import copy

from {module} import {name} as Whole


class {name}(Whole):
    """Built from its config, then as wide as `config.cut` says."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for path, shape in config.cut["sizes"].items():
            owner, _, name = path.rpartition(".")
            tensor = getattr(self.get_submodule(owner), name)
            tensor.data = tensor.data.new_empty(shape)
        for owner, numbers in config.cut["numbers"].items():
            for path, value in numbers.items():
                self._put(self.get_submodule(owner), path, value)

    @staticmethod
    def _put(module, path, value):
        name, _, inner = path.partition(".")
        if inner:  # of a config, or a table: others go on with theirs
            holder = copy.copy(getattr(module, name))
            (holder if isinstance(holder, dict) else vars(holder))[inner] = value
            value = holder
        elif isinstance(getattr(module, name), tuple):
            value = tuple(value)
        setattr(module, name, value)
'''


def cut_of(model: nn.Module) -> dict[str, Any]:
    """What tells a model from the one that its class builds from its config, if that is widths alone.

    Args:
        model: One of Hugging Face's.

    Returns:
        ``{"sizes": tensor → shape, "numbers": module → path → value}`` as plain data; empty: the config says all, or
        more is different than widths.
    """
    built = build_from_config(model, _library_class(model))
    if built is None:
        return {}
    mine, theirs = tensors_by_name(model), tensors_by_name(built)
    modules, others = modules_by_name(model), modules_by_name(built)
    if mine.keys() != theirs.keys() or modules.keys() != others.keys():
        return {}
    sizes = {n: list(t.shape) for n, t in mine.items() if t.shape != theirs[n].shape}
    if not sizes or not sizes.keys() <= model.state_dict().keys():  # what no file holds
        return {}
    numbers = {}
    for name, module in modules.items():
        known = dict(_numbers(others[name]))
        changed = {path: value for path, value in _numbers(module) if path in known and known[path] != value}
        if changed:
            numbers[name] = changed
    return {"sizes": sizes, "numbers": numbers}


def write_cut(model: Any, cut: dict[str, Any], folder: Path) -> str:
    """Write config, weights, and the code that builds them.

    Args:
        model: The model.
        cut: From :func:`cut_of`.
        folder: To write.

    Returns:
        How to load it.
    """
    # Names of weights as the modules have them: the library translates old ones for its own classes only.
    known = inspect.signature(type(model).save_pretrained).parameters
    save_besides(model, REFUSED, folder, **{name: False for name in ("save_original_format",) if name in known})
    return _write_code(model, cut, folder)


def _write_code(model: nn.Module, cut: dict[str, Any], folder: Path) -> str:
    """The code, and in ``config.json`` what it needs; returns how to load it."""
    base = _library_class(model)
    autos = _auto_classes(model, base)
    code = _SOURCE.format(name=base.__name__, module=base.__module__, auto=autos[0])
    (folder / CODE).write_text(code, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "architectures": [base.__name__],
        "auto_map": dict.fromkeys(autos, f"{Path(CODE).stem}.{base.__name__}"),
        "cut": cut,
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return f"{autos[0]}.from_pretrained(folder, trust_remote_code=True)"


def class_in(model: nn.Module, folder: Path) -> Any:
    """The class that the code in a folder defines.

    Args:
        model: The model that was written there.
        folder: With its code.
    """
    spec = importlib.util.spec_from_file_location(f"{Path(CODE).stem}_read_back", folder / CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, _library_class(model).__name__)


def _library_class(model: nn.Module) -> type[nn.Module]:
    """The class that builds it, beneath one that came out of such a folder."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))


def _auto_classes(model: Any, base: type[nn.Module]) -> list[str]:
    """Which of the library's classes that choose by the config build this one; any other may be told to, by name."""
    autos = importlib.import_module("transformers.models.auto.modeling_auto")
    found = []
    for name, auto in vars(autos).items():
        known = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        # Its truth, and its keys, would import every model that there is.
        built = () if known is None else known.get(type(model.config), ())
        if base in (built if isinstance(built, tuple) else (built,)):
            found.append(name)
    return sorted(found) or ["AutoModel"]


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Public numbers of a module, its lists of such, and numbers of what it holds, each with its path."""
    for name, value in vars(module).items():
        listed = isinstance(value, (list, tuple)) and all(type(part) is int for part in value)
        if not name.startswith("_") and (type(value) in (int, float) or (listed and value)):
            yield name, list(value) if listed else value
    yield from held_numbers(module)
