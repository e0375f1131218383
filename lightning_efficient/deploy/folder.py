"""A folder as model hubs have it: config, weights, and a card that says what was done to the model; read back."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
from torch import nn

from lightning_efficient.common.comparing import Difference, ExportError, difference
from lightning_efficient.common.escaping import cannot_write
from lightning_efficient.common.running import Inputs, as_call, evaluating, first_line, logs_from
from lightning_efficient.deploy.cut_code import CODE, class_in, cut_of, write_cut
from lightning_efficient.deploy.diverged import check_weights

_CARD = "README.md"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    methods: Mapping[str, Mapping[str, Any] | bool | None] | None = None,
    before: nn.Module | None = None,
    tolerance: float = 1e-5,
) -> Difference:
    """Write an exported model as a folder that Hugging Face's or timm's own loader reads, and read it back.

    ``from_pretrained(folder)`` of a Hugging Face model's class, ``timm.create_model("local-dir:<folder>")`` of a timm
    model. Beside config and ``model.safetensors`` lies a model card, ``README.md``: methods, arguments, sizes, checks.

    Where pruning has left widths that a Hugging Face config has no numbers for (heads of BERT, layers that are not
    equally wide), the folder also holds a few lines of code that build them, ``modeling_cut.py``, and is read with
    ``AutoModel...from_pretrained(folder, trust_remote_code=True)``; the card names the class. That needs nothing of
    this package. Without the code the library's loader stops with an error at sizes that do not match.

    Args:
        model: What :func:`lightning_efficient.export` returned of a Hugging Face or timm model: ``export(module.net,
            x)``, not the LightningModule around it.
        folder: To write; files of a model that are there are replaced, once the new ones are read back.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        methods: Key of a method → its arguments, for the card: as given to ``attach``, or ``callback.config()``.
        before: The model before export or cutting, for the sizes in the card.
        tolerance: Largest accepted difference between the model and what was read back, relative to the outputs' scale.

    Returns:
        That difference.

    Raises:
        TypeError: The model is of neither library.
        ExportError: The library's loader cannot build the model (its form has changed), or it computes something else.
            The folder is as it was.
        OSError: The folder cannot be written: in one sentence, with the reason.
    """
    check_weights(model)
    library = _library(model)
    target = Path(folder)
    with cannot_write(target), ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent))
        # Its loader logs a table of what does not fit; what comes of that is said here.
        stack.enter_context(logs_from(logging.ERROR, library))
        try:
            how = _write(model, library, draft)
        except ExportError:
            raise
        except Exception as error:
            raise OSError(first_line(error)) from error
        try:
            read = _read(model, library, Path(draft))
        except Exception as error:
            raise ExportError(_changed(model, library, first_line(error))) from error
        call = as_call(example_inputs)
        with evaluating(model), evaluating(read):
            apart = difference(call.run(model), call.run(read))
        apart.check(tolerance, f"what {library} reads from the folder")
        (Path(draft) / _CARD).write_text(_card(model, library, methods or {}, before, apart, how), encoding="utf-8")
        target.mkdir(exist_ok=True)
        for path in Path(draft).iterdir():
            shutil.move(path, target / path.name)
    return apart


def _library(model: nn.Module) -> str:
    family = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "transformers" in family and hasattr(model, "save_pretrained"):
        return "transformers"
    if getattr(model, "pretrained_cfg", None) is not None:
        return "timm"
    raise TypeError(
        f"save_pretrained writes what transformers or timm reads, and {type(model).__name__} is a model of neither. "
        "Export the network inside (`export(module.net, x)`), or write a file: `save_exported(model, x, 'model.pt2')`."
    )


def _write(model: Any, library: str, folder: str) -> str:
    """Write it; returns how it is read."""
    if library == "timm":
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        return 'timm.create_model("local-dir:<folder>", pretrained=True)'
    if cut := cut_of(model):
        return write_cut(model, cut, Path(folder))
    model.save_pretrained(folder)
    return f"{type(model).__name__}.from_pretrained(folder)"


def _read(model: Any, library: str, folder: Path) -> nn.Module:
    network: nn.Module
    if library == "timm":
        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return network
    cls = class_in(model, folder) if (folder / CODE).is_file() else type(model)
    # Mismatched sizes are refused below, by name; the library's own error names an option of its loader.
    network, told = cls.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    odd = [*told["missing_keys"], *told["unexpected_keys"], *(key[0] for key in told["mismatched_keys"])]
    if odd:
        raise ValueError(f"tensors that its config does not build: {sorted(odd)[:3]}")
    return network


def _changed(model: nn.Module, library: str, why: str) -> str:
    return (
        f"{library} cannot build {type(model).__name__} as it is now ({why}): a method has changed its form, and the "
        "config has no word for that. Write a program instead: `save_exported(model, x, 'model.pt2')`."
    )


def _card(
    model: nn.Module,
    library: str,
    methods: Mapping[str, Mapping[str, Any] | bool | None],
    before: nn.Module | None,
    apart: Difference,
    how: str,
) -> str:
    """Markdown with the metadata that hubs read."""
    lines = ["---", f"library_name: {library}", "tags:", "- lightning-efficient"]
    lines += [f"- {name.replace('_', '-')}" for name in methods] + ["---", "", f"# {type(model).__name__}", ""]
    lines += [
        "Trained with lightning-efficient and exported: it needs none of that to run.",
        "",
        "## What was done",
        "",
    ]
    for name, given in methods.items():
        arguments = given if isinstance(given, Mapping) else {}
        lines += [f"- `{name}`", "", "  ```json", f"  {json.dumps(dict(arguments), default=str)}", "  ```", ""]
    lines += ["" if methods else "Nothing that the author named.", "## Size", "", "| | parameters | zeros |"]
    lines += ["|---|---|---|"]
    for title, network in (("before", before), ("this model", model)):
        if network is not None:
            count = sum(p.numel() for p in network.parameters())
            zeros = sum(int((p == 0).sum()) for p in network.parameters()) / max(count, 1)
            lines.append(f"| {title} | {count:,} | {zeros:.1%} |")
    lines += ["", "## To load it", "", f"`{how}`, of {library}.", ""]
    lines += ["## Checks", "", f"Read back with {library} and run on example inputs: {apart}.", ""]
    return "\n".join(lines)
