"""Running a model as it would be deployed, without leaving a trace in it, and comparing what comes out."""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.nests import named_tensors, tensors_in

# One tensor, a tuple of positional arguments, or a dict of keyword arguments (as Lightning's
# example_input_array).
Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for messages that quote it."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def logs_from(level: int, *names: str) -> Iterator[None]:
    """What libraries log below a level stays unsaid inside this context.

    Args:
        level: Of ``logging``.
        *names: Of their loggers.
    """
    loggers = [(logger := logging.getLogger(name), logger.level) for name in names]
    try:
        for logger, _ in loggers:
            logger.setLevel(level)
        yield
    finally:
        for logger, before in loggers:
            logger.setLevel(before)


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
        with torch.random.fork_rng(devices=_cuda_devices([*model.parameters(), *model.buffers()])), uncompiled():
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


def calls_of_batch(model: nn.Module, batch: Any) -> list[Call]:
    """The calls that a training batch may stand for, the likeliest first.

    Args:
        model: Its ``forward`` says which items of a mapping it takes.
        batch: A tensor, or a nest.
    """
    calls = [Call((batch,))]
    if isinstance(batch, Mapping):
        known = inspect.signature(model.forward).parameters
        taken = {key: value for key, value in batch.items() if key in known}
        calls = [*([Call((), taken)] if taken else []), Call((), batch), *calls]
    elif isinstance(batch, (tuple, list)) and batch:
        calls.append(Call((batch[0],)))
    return calls


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})


@contextmanager
def randomness_kept(devices: Iterable[int] = ()) -> Iterator[None]:
    """What is drawn inside is drawn again afterwards: by torch, numpy and Python's own generator.

    Args:
        devices: Indices of CUDA devices, beside the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def as_found(
    *models: nn.Module, parameters: bool = False, apart: Iterable[nn.Module] = (), randomness: bool = True
) -> Iterator[None]:
    """Whatever runs inside leaves no trace in the models.

    Training flags, ``requires_grad``, gradients (None inside), buffers, and random states, those of generators held by
    modules included, come back module by module as they were.

    Args:
        models: The models that will run.
        parameters: Also the values of parameters, for code that may write to them (a momentum teacher's average). Takes
            a copy of them.
        apart: Modules whose buffers are the caller's to write.
        randomness: ``False``: random states go on, so that two runs show whether a model draws.
    """
    modules = [module for model in models for module in model.modules()]
    flags = [(module, module.training) for module in modules]
    params = list({id(p): p for module in modules for p in module._parameters.values() if p is not None}.values())
    grads = [(p, p.requires_grad, p.grad) for p in params]
    values = [(p, p.data, p.detach().clone()) for p in params] if parameters else []
    left = {id(module) for part in apart for module in part.modules()}
    owners = [module for module in modules if id(module) not in left]
    buffers = [(m, name, b, b.clone()) for m in owners for name, b in m._buffers.items() if b is not None]
    # Not `isinstance`, which this class makes slow: it is asked of every attribute of every module.
    own = {id(v): v for m in modules for v in vars(m).values() if torch.Generator in type(v).__mro__}
    generators = [(generator, generator.get_state()) for generator in own.values()]
    own_buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    devices = _cuda_devices([*params, *own_buffers])
    try:
        for p in params:
            p.grad = None
        with randomness_kept(devices) if randomness else nullcontext():
            yield
    finally:
        for module, training in flags:
            module.training = training
        for generator, state in generators:
            generator.set_state(state)
        with torch.no_grad():
            for p, data, value in values:
                p.data = data  # a teacher's average may have been put in its place
                _put_back(p, value)
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                _put_back(buffer, value)
        for p, requires_grad, grad in grads:
            if p.requires_grad is not requires_grad:
                p.requires_grad_(requires_grad)
            p.grad = grad


def _put_back(tensor: Tensor, value: Tensor) -> None:
    # An unconditional copy_ would raise the version counter of every tensor autograd may have saved.
    if not torch.equal(tensor, value):
        tensor.copy_(value)


@contextmanager
def evaluating(*models: nn.Module, apart: Iterable[nn.Module] = (), randomness: bool = True) -> Iterator[None]:
    """Evaluation mode without gradients; the models, and random states, come back as they were.

    Args:
        models: The models that will run; see :func:`as_found`.
        apart: See :func:`as_found`.
        randomness: See :func:`as_found`.
    """
    with as_found(*models, apart=apart, randomness=randomness), torch.no_grad():
        for model in models:
            model.eval()
        yield


def forget(model: nn.Module) -> None:
    """Let modules drop what they keep from their weights in evaluation mode (timm's LeViT: position biases).

    Args:
        model: Comes out with every module in the mode it was in.
    """
    modules = list(model.modules())
    keepers = [module for module in modules if getattr(module.train, "__func__", None) is not nn.Module.train]
    if not keepers:  # torch's own `train` sets flags and nothing else
        return
    modes = [(module, module.training) for module in modules]
    for keeper in keepers:
        keeper.train()
    own = {id(keeper) for keeper in keepers}
    for module, mode in modes:
        if id(module) in own and not mode:
            module.train(False)
    for module, mode in modes:  # a parent's `train` takes its children along
        module.training = mode


_LOW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
# Products of mixtures of experts, whose kernels have no float64; older versions of torch have one of them or none.
_GROUPED = {f for f in (getattr(torch.nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f}


class Float64(TorchFunctionMode):
    """Keeps a float64 model in float64 where its code asks for less (``softmax(dtype=torch.float32)``).

    Rounding to float32 in the middle of a forward would hide an error of 1e-8 and show one where there is none.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The same call with every lower floating dtype among its arguments raised."""
        func = torch.Tensor.double if func in _CASTS else func
        args = tuple(map(_raised, args))
        kwargs = {key: _raised(value) for key, value in kwargs.items()} if kwargs else {}
        out = (_grouped_product if func in _GROUPED else func)(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype in _LOW and next(tensors_in((args, kwargs)), None) is None:
            return out.double()
        return out


def float64_copy(model: nn.Module) -> nn.Module:
    """A deep copy in float64 and evaluation mode, to try things on."""
    return eager_copy(model).double().eval()


def eager_copy(model: nn.Module) -> nn.Module:
    """A deep copy, whose forwards are as they are written."""
    with torch.no_grad():  # copies of scripted modules would have a history
        twin = copy.deepcopy(model)
    for module in twin.modules():
        # A compiled function is copied by reference, so that it would run the original.
        original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
        if original is not None and getattr(original, "__func__", None) is type(module).forward:
            del module.forward
    return twin


def _grouped_product(
    one: Tensor, two: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """``F.grouped_mm`` written out: rows of ``one`` up to each offset, times the matrix of their group."""
    if offs is None:
        out = one @ two
    elif one.dim() == 2 and two.dim() == 3:
        ends = offs.tolist()
        parts = [one[a:b] @ m for a, b, m in zip([0, *ends], ends, two, strict=False)]
        # Rows of no group: the kernel leaves them undefined.
        out = torch.cat([*parts, one.new_zeros(len(one) - ends[-1], two.shape[-1])])
    else:
        raise NotImplementedError(f"grouped_mm of shapes {tuple(one.shape)} and {tuple(two.shape)} in float64")
    return out if bias is None else out + bias


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.clone()
