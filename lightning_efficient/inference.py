"""Running a model as it would be deployed, without leaving a trace in it, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.eager import uncompiled

# One tensor, a tuple of positional arguments, or a dict of keyword arguments (as Lightning's
# example_input_array).
Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


class ExportError(RuntimeError):
    """A model cannot be exported, or the export does not compute the same; nothing has been changed."""


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for messages that quote it."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Call:
    """The arguments of one ``model(...)`` call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def on(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh copies of the arguments on the model's device: a model may work on its input in place."""
        device = device_of(model)
        fresh = apply_to_collection(
            (self.args, dict(self.kwargs or {})), Tensor, lambda t: t.detach().to(device, copy=True)
        )
        return fresh[0], fresh[1]

    def run(self, model: nn.Module) -> Any:
        """The model's output; the random state (CPU and the model's CUDA devices) is as before."""
        args, kwargs = self.on(model)
        with torch.random.fork_rng(devices=_cuda_devices(model)), uncompiled():
            return model(*args, **kwargs)

    def resized(self, batch: int) -> Call:
        """The same call with ``batch`` samples: rows of every tensor, repeated or cut along its first axis.

        Raises:
            ValueError: The tensors do not share a first axis, so it cannot be the batch.
        """
        sizes = {name: t.shape[0] if t.ndim else None for name, t in named_tensors(self.parts)}
        if len(set(sizes.values())) != 1 or None in sizes.values():
            raise ValueError(
                f"the example inputs share no first (batch) axis: sizes {sizes}. Measure them as given with "
                "`batch_sizes=None`; save with `dynamic_batch=False`."
            )

        def rows(tensor: Tensor) -> Tensor:
            return tensor[torch.arange(batch, device=tensor.device) % tensor.shape[0]]

        parts = apply_to_collection((self.args, dict(self.kwargs or {})), Tensor, rows)
        return Call(parts[0], parts[1])

    @property
    def parts(self) -> dict[str, Any]:
        """Name → argument; positional ones are named by their place."""
        return {**{str(i): value for i, value in enumerate(self.args)}, **(self.kwargs or {})}

    def __str__(self) -> str:
        shapes = [f"{name}: {tuple(t.shape)} {t.dtype}" for name, t in named_tensors(self.parts)]
        return ", ".join(shapes) or "no tensors"


def as_call(example_inputs: Inputs) -> Call:
    """Read example inputs as Lightning reads ``example_input_array``.

    Args:
        example_inputs: A tensor (the only argument), a tuple (positional arguments) or a mapping (keyword
            arguments).

    Raises:
        TypeError: Anything else; a list could be either one argument or several.
    """
    if isinstance(example_inputs, Tensor):
        return Call((example_inputs,))
    if isinstance(example_inputs, tuple):
        return Call(example_inputs)
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    raise TypeError(
        "`example_inputs` takes a tensor, a tuple of positional or a dict of keyword arguments; got "
        f"{type(example_inputs).__name__}. One list as the only argument is written `([...],)`."
    )


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _cuda_devices(model: nn.Module) -> list[int]:
    tensors = (*model.parameters(), *model.buffers())
    return sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags, buffers and random state come back as they were.

    Args:
        models: The models that will run. Module by module their flags return, however they were mixed.
    """
    modules = [module for model in models for module in model.modules()]
    flags = [(module, module.training) for module in modules]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    devices = sorted({index for model in models for index in _cuda_devices(model)})
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # An unconditional copy_ would raise the version counter of every buffer autograd may have
                # saved.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, sequences and dataclasses, with the path that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, (tuple, list)):
        items = iter(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, item in items:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart.

    Args:
        absolute: Largest ``|before - after|`` of all elements, in the output's own unit; inf where one is not
            finite and the other is something else.
        relative: Largest ratio, over the tensors of the output, of that to the tensor's scale ``max
            |before|`` (1 if the tensor is all zero).
        output: Path of the tensor with the largest ratio.
    """

    absolute: float
    relative: float
    output: str

    def __str__(self) -> str:
        return f"max abs difference {self.absolute:.3g} ({self.relative:.3g} of the output scale)"

    def check(self, tolerance: float, what: str) -> None:
        """Raise if the relative difference is above ``tolerance``.

        Raises:
            ExportError: With both figures, and the tensor they were found in.
        """
        if not self.relative <= tolerance:
            where = f" in output {self.output!r}" if self.output else ""
            raise ExportError(
                f"{what} differs from the model{where}: {self}; `tolerance` is {tolerance:g}. Nothing was "
                "changed or kept. If rounding alone explains it (float16, bfloat16), raise `tolerance`."
            )


def difference(before: Any, after: Any) -> Difference:
    """Compare two outputs tensor by tensor, in float64.

    Args:
        before: Output of the reference: tensors, or anything nested that holds some.
        after: Output to judge, of the same structure. Values that are not tensors are not compared.

    Raises:
        ExportError: No tensor found, or the numbers, names or shapes of the tensors differ.
    """
    left, right = dict(named_tensors(before)), dict(named_tensors(after))
    if not left:
        raise ExportError(f"the model returned {type(before).__name__}, in which no tensor was found to compare.")
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (left, right)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the outputs differ in structure: expected {shapes[0]}, got {shapes[1]}.")
    found = [_pair(name, left[name], right[name]) for name in left]
    worst = max(found, key=lambda d: d.relative)
    return Difference(max(d.absolute for d in found), worst.relative, worst.output)


def _pair(name: str, before: Tensor, after: Tensor) -> Difference:
    wide = torch.complex128 if before.is_complex() or after.is_complex() else torch.float64
    a, b = (t.detach().to("cpu").to(wide) for t in (before, after))
    if a.numel() == 0:
        return Difference(0.0, 0.0, name)
    gap = (a - b).abs()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, gap).nan_to_num(nan=torch.inf, posinf=torch.inf)
    finite = a.abs()[a.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    absolute = float(gap.max())
    return Difference(absolute, absolute / (scale or 1.0), name)
