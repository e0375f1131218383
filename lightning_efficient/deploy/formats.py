"""Files of an exported model: programs, ONNX, state dicts; read back and compared before they count."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_efficient.common.comparing import Difference, ExportError, difference
from lightning_efficient.common.nests import named_tensors
from lightning_efficient.common.running import Call, Inputs, as_call, evaluating
from lightning_efficient.deploy.diverged import check_weights

# ONNX is a protobuf, which ends at 2 GiB; weights of larger models go into a file beside it.
_PROTOBUF_LIMIT = 2**31 - 2**20


def save_exported(
    model: nn.Module,
    example_inputs: Inputs | None,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-5,
) -> Difference | None:
    """Save a model in the format its file name's suffix asks for.

    Args:
        model: What :func:`lightning_efficient.export` returned, or any plain module.
        example_inputs: Needed for programs: a tensor, a tuple of positional or a dict of keyword arguments.
        path: ``.pt2`` (``torch.export``), ``.onnx``, or the state dict alone: ``.safetensors``, ``.pt``,
            ``.pth`` (read by ``torch.load(weights_only=True)``; tied weights are in a ``.safetensors`` file
            once, as ``safetensors.torch.load_model`` expects). Folders are made as needed; an existing file
            is replaced.
        dynamic_batch: Programs accept any batch size.
        tolerance: Largest accepted difference of a program's outputs, relative to the output's scale.

    Returns:
        The difference between the model and the program read back; ``None`` for a state dict, which is
        compared bit by bit.

    Raises:
        ValueError: Another suffix, or no ``example_inputs`` for a program.
        ImportError: A package the format needs is missing.
        ExportError: The model has diverged (see :func:`lightning_efficient.export`), or what was read back differs. No
            file is left behind, and an old one stays.
    """
    target = Path(path)
    programs = {".pt2": to_torch_export, ".onnx": to_onnx}
    states = {".safetensors": _save_safetensors, ".pt": _save_state, ".pth": _save_state}
    if target.suffix in programs:
        if example_inputs is None:
            raise ValueError(f"a {target.suffix} file holds a traced program: pass `example_inputs`.")
        save = programs[target.suffix]
        return save(model, example_inputs, target, dynamic_batch=dynamic_batch, tolerance=tolerance)
    if target.suffix not in states:
        raise ValueError(f"`path` is {str(path)!r}; expected a suffix among {', '.join([*programs, *states])}.")
    check_weights(model)
    with _draft(target) as draft:
        states[target.suffix](model, draft)
    return None


def to_torch_export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-5,
) -> Difference:
    """Trace with ``torch.export``, save, read back and compare.

    Args:
        model: The model; traced in evaluation mode and left as it is.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        path: File to write, usually ``.pt2``.
        dynamic_batch: The first axis of every input tensor may have any size.
        tolerance: Largest accepted difference of the outputs, relative to the output's scale.

    Returns:
        The difference between the outputs of the model and of the program read back.

    Raises:
        ExportError: The model cannot be traced, or the outputs differ by more than ``tolerance``.
    """
    with _draft(Path(path)) as draft, evaluating(model):
        torch.export.save(_trace(model, as_call(example_inputs), dynamic_batch), draft)
        program = torch.export.load(draft).module()
        return _compare(model, program, as_call(example_inputs), dynamic_batch, tolerance, "the .pt2 program")


def to_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-5,
) -> Difference:
    """Convert with ``torch.onnx`` (from a ``torch.export`` program), run in onnxruntime on the CPU and
    compare.

    Args:
        model: The model; traced in evaluation mode and left as it is.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        path: File to write, usually ``.onnx``; the weights of models above 2 GiB lie in a second file beside
            it.
        dynamic_batch: The first axis of every input tensor may have any size.
        tolerance: Largest accepted difference of the outputs, relative to the output's scale.

    Returns:
        The difference between the outputs of the model and of onnxruntime.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ExportError: The model cannot be converted, or the outputs differ by more than ``tolerance``.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    with _draft(Path(path)) as draft, evaluating(model):
        program = _trace(model, as_call(example_inputs), dynamic_batch)
        with _as_export_error("torch.onnx cannot convert the model"):
            torch.onnx.export(program, f=draft, dynamo=True, verbose=False, external_data=size > _PROTOBUF_LIMIT)
        runtime = _onnxruntime(draft)
        return _compare(model, runtime, as_call(example_inputs), dynamic_batch, tolerance, "the ONNX program")


def _trace(model: nn.Module, call: Call, dynamic_batch: bool) -> torch.export.ExportedProgram:
    check_weights(model)
    # One sample would be taken for a constant: torch specializes sizes 0 and 1.
    args, kwargs = (call.resized(2) if dynamic_batch else call).on(model)
    shapes = _dynamic(kwargs or args) if dynamic_batch else None
    with _as_export_error("torch.export cannot trace the model"):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _dynamic(value: Any) -> Any:
    """The same nest with ``{0: dynamic}`` for every tensor and None for everything else."""
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.DYNAMIC}
    if isinstance(value, Mapping):
        return {key: _dynamic(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_dynamic(item) for item in value)
    return None


def _compare(
    model: nn.Module,
    program: Callable[..., Any],
    call: Call,
    dynamic_batch: bool,
    tolerance: float,
    what: str,
) -> Difference:
    for sized in (call, call.resized(3)) if dynamic_batch else (call,):
        args, kwargs = sized.on(model)
        apart = difference(dict(enumerate(_flat(sized.run(model)))), dict(enumerate(_flat(program(*args, **kwargs)))))
        apart.check(tolerance, what)
    return apart


def _onnxruntime(path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = _flat((args, kwargs))
        if len(tensors) != len(names):
            raise ExportError(f"the ONNX program takes {names}, but the example holds {len(tensors)} tensors.")
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def _save_state(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    with _as_export_error("the state dict cannot be read back by torch.load(weights_only=True)"):
        read = torch.load(path, weights_only=True)
    _same_tensors(read, model)


def _save_safetensors(model: nn.Module, path: Path) -> None:
    _require("safetensors")
    from safetensors.torch import load_file, save_model

    with _as_export_error("safetensors cannot hold the state dict"):
        save_model(model, str(path))
    _same_tensors(load_file(path), model)


def _same_tensors(read: Mapping[str, Any], model: nn.Module) -> None:
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    stored = {t.data_ptr() for name, t in state.items() if name in read}
    lost = [name for name, t in state.items() if name not in read and t.data_ptr() not in stored]
    if lost:
        raise ExportError(f"missing from the file: {lost}.")
    for name in state.keys() & read.keys():
        with _as_export_error(f"{name!r} was read back differently"):
            torch.testing.assert_close(read[name].cpu(), state[name].cpu(), rtol=0, atol=0, equal_nan=False)


def _flat(value: Any) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(value)]


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A path to write to; what lies there moves to ``target`` if the body, which checks it, succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        yield Path(folder, target.name)
        for file in Path(folder).iterdir():
            os.replace(file, target.parent / file.name)


@contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"{what}: {type(error).__name__}: {lines[0] if lines else ''}") from error


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} missing; install with `pip install {' '.join(missing)}`.")
