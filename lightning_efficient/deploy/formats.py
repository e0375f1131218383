"""Files of an exported model: programs, ONNX, state dicts; read back and compared before they count."""

from __future__ import annotations

import importlib.util
import inspect
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_efficient.common.comparing import Difference, ExportError, difference
from lightning_efficient.common.escaping import cannot_write, umask
from lightning_efficient.common.nests import named_tensors
from lightning_efficient.common.registry import near
from lightning_efficient.common.running import Call, Inputs, as_call, evaluating, first_line
from lightning_efficient.deploy.diverged import check_weights

_PROGRAMS = (".pt2", ".onnx")
_STATES = (".safetensors", ".pt", ".pth")
Axes: TypeAlias = Mapping[str | int, Sequence[int]]
# ONNX is a protobuf, which ends at 2 GiB; weights of larger models go into a file beside it.
_PROTOBUF_LIMIT = 2**31 - 2**20


def save_exported(
    model: nn.Module,
    example_inputs: Inputs | None,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-5,
    dynamic_axes: Axes | None = None,
    opset: int | None = None,
    output_names: Sequence[str] | None = None,
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
        dynamic_axes: Input → axes of any size, of a program: by its name in ``forward``, or its place.
        opset: Of an ONNX program; ``None``: as ``torch.onnx`` chooses.
        output_names: Of an ONNX program's outputs.

    Returns:
        The difference between the model and the program read back; ``None`` for a state dict, which is
        compared bit by bit.

    Raises:
        ValueError: Another suffix, or no ``example_inputs`` for a program.
        ImportError: A package the format needs is missing.
        ExportError: The model has diverged (see :func:`lightning_efficient.export`), or what was read back differs. No
            file is left behind, and an old one stays.
    """
    check_path(path, opset=opset, output_names=output_names)
    target = Path(path)
    if target.suffix in _PROGRAMS:
        if example_inputs is None:
            raise ValueError(f"a {target.suffix} file holds a traced program: pass `example_inputs`.")
        of_all: dict[str, Any] = {
            "dynamic_batch": dynamic_batch, "tolerance": tolerance, "dynamic_axes": dynamic_axes,
        }  # fmt: skip
        if target.suffix == ".pt2":
            return to_torch_export(model, example_inputs, target, **of_all)
        return to_onnx(model, example_inputs, target, **of_all, opset=opset, output_names=output_names)
    states = {".safetensors": _save_safetensors, ".pt": _save_state, ".pth": _save_state}
    check_weights(model)
    with _draft(target) as draft:
        states[target.suffix](model, draft)
    return None


def check_path(path: str | os.PathLike[str], **of_onnx: Any) -> None:
    """Refuse a file name that says no format, before anything is made for it.

    Args:
        path: The file to write.
        **of_onnx: Arguments that only an ``.onnx`` file has a use for.

    Raises:
        ValueError: Another suffix, or one of these for another format.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`path` should name a file; got {type(path).__name__}: it is the last of model, example_inputs and path."
        )
    suffix = Path(path).suffix
    if suffix not in (*_PROGRAMS, *_STATES):
        raise ValueError(f"`path` is {str(path)!r}; expected a suffix among {', '.join([*_PROGRAMS, *_STATES])}.")
    for name, value in of_onnx.items():
        if value is not None and suffix != ".onnx":
            raise ValueError(f"`{name}`={value!r} is for .onnx files; `path` is {str(path)!r}.")


def to_torch_export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-5,
    dynamic_axes: Axes | None = None,
) -> Difference:
    """Trace with ``torch.export``, save, read back and compare.

    Args:
        model: The model; traced in evaluation mode and left as it is.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        path: File to write, usually ``.pt2``.
        dynamic_batch: The first axis of every input tensor may have any size.
        tolerance: Largest accepted difference of the outputs, relative to the output's scale.
        dynamic_axes: As for :func:`save_exported`.

    Returns:
        The difference between the outputs of the model and of the program read back.

    Raises:
        ExportError: The model cannot be traced, or the outputs differ by more than ``tolerance``.
    """
    with _draft(Path(path)) as draft, evaluating(model):
        free = _Free.of(model, as_call(example_inputs), dynamic_batch, dynamic_axes)
        draft.write_bytes(_in_memory(torch.export.save, _trace(model, free)))
        program = torch.export.load(draft).module()
        return _compare(model, program, free, tolerance, "the .pt2 program")


def to_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-5,
    dynamic_axes: Axes | None = None,
    opset: int | None = None,
    output_names: Sequence[str] | None = None,
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
        dynamic_axes: As for :func:`save_exported`.
        opset: As for :func:`save_exported`.
        output_names: As for :func:`save_exported`.

    Returns:
        The difference between the outputs of the model and of onnxruntime.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ExportError: The model cannot be converted, or the outputs differ by more than ``tolerance``.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    with _draft(Path(path)) as draft, evaluating(model):
        free = _Free.of(model, as_call(example_inputs), dynamic_batch, dynamic_axes)
        program = _trace(model, free)
        options: dict[str, Any] = {"opset_version": opset} if opset is not None else {}
        if output_names is not None:
            options["output_names"] = list(output_names)
        with _as_export_error("torch.onnx cannot convert the model"):
            torch.onnx.export(
                program, f=draft, dynamo=True, verbose=False, external_data=size > _PROTOBUF_LIMIT, **options
            )
        _check_onnx(draft, opset, output_names)
        runtime = _onnxruntime(draft)
        return _compare(model, runtime, free, tolerance, "the ONNX program")


@dataclass(frozen=True)
class _Free:
    """A call, and which axes of its tensors may have any size.

    Args:
        call: As given.
        batch: Whether the first axis of every tensor may.
        axes: Place or name of an argument, as in ``call.parts`` → further axes.
    """

    call: Call
    batch: bool
    axes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, call: Call, batch: bool, axes: Axes | None) -> _Free:
        """Checked against the call.

        Raises:
            ValueError: ``axes`` names no input, or one that is no tensor or has no such axis.
        """
        parts = call.parts
        names = list(inspect.signature(model.forward).parameters)
        places = {name: str(i) for i, name in enumerate(names[: len(call.args)])} | {name: name for name in parts}
        found = {}
        for name, wanted in (axes or {}).items():
            if str(name) not in places:
                raise ValueError(f"`dynamic_axes` names {name!r}{near(name, places)}; the inputs are {list(places)}.")
            value = parts[places[str(name)]]
            if not isinstance(value, Tensor) or not all(0 <= axis < value.ndim for axis in wanted):
                what = f"{value.ndim} axes" if isinstance(value, Tensor) else f"no tensor but {type(value).__name__}"
                raise ValueError(f"`dynamic_axes` gives {list(wanted)} for {name!r}, which has {what}, counted from 0.")
            found[places[str(name)]] = tuple(wanted)
        return cls(call, batch, found)

    def traced(self) -> Call:
        """The call to trace: torch takes sizes 0 and 1 for constants."""
        call = self.call.resized(2) if self.batch else self.call
        return _grown(call, {n: tuple(a for a in axes if call.parts[n].shape[a] < 2) for n, axes in self.axes.items()})

    def others(self) -> list[Call]:
        """The call, and calls of other sizes that the program has to take."""
        others = [self.call.resized(3)] if self.batch else []
        return [self.call, *others, *([_grown(self.traced(), self.axes)] if self.axes else [])]

    def shapes(self) -> Any:
        """For ``torch.export``."""
        if not self.batch and not self.axes:
            return None
        shapes = {name: self._of(value, self.axes.get(name, ())) for name, value in self.call.parts.items()}
        return shapes if self.call.kwargs else tuple(shapes.values())

    def _of(self, value: Any, axes: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor):
            return dict.fromkeys({*axes, *([0] if self.batch else [])}, torch.export.Dim.DYNAMIC)
        if isinstance(value, Mapping):
            return {key: self._of(item, ()) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._of(item, ()) for item in value)
        return None


def _grown(call: Call, axes: Mapping[str, tuple[int, ...]]) -> Call:
    """One more entry along some axes, a copy of the first."""
    parts = dict(call.parts)
    for name, grown in axes.items():
        for axis in grown:
            parts[name] = torch.cat([parts[name], parts[name].narrow(axis, 0, 1)], axis)
    values = list(parts.values())
    return Call(tuple(values[: len(call.args)]), dict(list(parts.items())[len(call.args) :]) or None)


def _trace(model: nn.Module, free: _Free) -> torch.export.ExportedProgram:
    check_weights(model)
    args, kwargs = free.traced().on(model)
    with _as_export_error("torch.export cannot trace the model"):
        return torch.export.export(model, args, kwargs, dynamic_shapes=free.shapes())


def _compare(model: nn.Module, program: Callable[..., Any], free: _Free, tolerance: float, what: str) -> Difference:
    for sized in free.others():
        args, kwargs = sized.on(model)
        apart = difference(dict(enumerate(_flat(sized.run(model)))), dict(enumerate(_flat(program(*args, **kwargs)))))
        apart.check(tolerance, what)
    return apart


def _check_onnx(path: Path, opset: int | None, output_names: Sequence[str] | None) -> None:
    """torch.onnx leaves the version that it has where it cannot convert, and names beyond the outputs aside."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    got = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        raise ExportError(f"`opset`={opset} cannot be had: torch.onnx made opset {got}. Ask for that, or for none.")
    outputs = [output.name for output in model.graph.output]
    if output_names is not None and outputs != list(output_names):
        raise ExportError(
            f"`output_names` are {list(output_names)}, but the model has {len(outputs)} output(s), {outputs}."
        )


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


def _in_memory(save: Callable[[Any, Any], None], content: Any) -> memoryview:
    """First: torch's own writer ends the whole process on a full disk (``terminate``)."""
    buffer = io.BytesIO()
    save(content, buffer)
    return buffer.getbuffer()


def _save_state(model: nn.Module, path: Path) -> None:
    path.write_bytes(_in_memory(torch.save, model.state_dict()))
    with _as_export_error("the state dict cannot be read back by torch.load(weights_only=True)"):
        read = torch.load(path, weights_only=True)
    _same_tensors(read, model)


def _save_safetensors(model: nn.Module, path: Path) -> None:
    _require("safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_model

    with _as_export_error("safetensors cannot hold the state dict"):
        try:
            save_model(model, str(path))
        except SafetensorError as error:  # what it cannot hold is another error
            raise OSError(first_line(error)) from error
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
    with cannot_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            yield Path(folder, target.name)
            for file in Path(folder).iterdir():
                file.chmod(0o666 & ~umask())  # safetensors writes for the owner alone
                os.replace(file, target.parent / file.name)


@contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError:  # of the file
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"{what}: {type(error).__name__}: {lines[0] if lines else ''}") from error


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} missing; install with `pip install {' '.join(missing)}`.")
