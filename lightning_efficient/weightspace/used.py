"""Which parameters multiply activations as matrices, whatever module holds them: seen in one forward."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_efficient.common.eager import uncompiled
from lightning_efficient.common.nests import tensors_in

Use = Literal["matrix", "stack", "other"]

_PRODUCTS = frozenset(
    {F.linear, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum}
    | {Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv}
    | {f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None}
)
# Copies that hold the same matrices, or some of them.
_COPIES = frozenset(
    {Tensor.__getitem__, Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double}
    | {Tensor.contiguous, Tensor.clone, Tensor.index_select, torch.index_select, Tensor.transpose, Tensor.reshape}
)


def matrices_used(parameters: Mapping[str, nn.Parameter], run: Callable[[], Any]) -> dict[str, Use]:
    """How parameters take part in the matrix products of one forward.

    Args:
        parameters: Name -> parameter of two or more axes.
        run: Makes the forward.

    Returns:
        Name -> ``"matrix"`` (two axes), ``"stack"`` (three: one matrix for each entry of the first) or ``"other"`` (in
        another shape, or summed over the stack). Those that are in no product are missing.
    """
    watch = _Watch(parameters)
    with uncompiled(), watch:
        run()
    return watch.uses


class _Watch(TorchFunctionMode):
    """Parameters are known by their storage, so that views count, and copies of whole matrices by what made them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        self._parameters = dict(parameters)
        self._stored = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self._copies: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call, and note the parameters in it."""
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            for place, operand in enumerate(tensors_in((args, kwargs or {}))):
                if (name := self._name(operand)) is not None:
                    equation = args[0] if func is torch.einsum and isinstance(args[0], str) else ""
                    use = _use(self._parameters[name], operand, equation, place)
                    # Once in another shape: that is what has to be said.
                    self.uses[name] = use if self.uses.get(name, use) == use else "other"
        elif func in _COPIES and isinstance(out, Tensor) and (name := self._name(args[0])) is not None:
            self._copies[id(out)] = (weakref.ref(out), name)
        return out

    def _name(self, tensor: Any) -> str | None:
        if not isinstance(tensor, Tensor):
            return None
        entry = self._copies.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        try:
            return self._stored.get(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # a subclass without one storage
            return None


def _use(parameter: nn.Parameter, operand: Tensor, equation: str, place: int) -> Use:
    if parameter.dim() == 2:
        return "matrix"
    if parameter.dim() != 3 or operand.dim() not in (2, 3):
        return "other"
    stack, size = parameter.shape[0], parameter.shape[1] * parameter.shape[2]
    if operand.dim() == 3:
        term, output = _term(equation, place)
        if term and term[0] not in output:
            return "other"
        return "stack" if operand.shape[0] <= stack or operand[0].numel() <= size else "other"
    return "stack" if operand.numel() <= size else "other"


def _term(equation: str, place: int) -> tuple[str, str]:
    """The letters of an einsum's operand, and of its output."""
    if not equation:
        return "", ""
    inputs, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    return inputs.split(",")[place], output


def low_rank(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Trained factors of low-rank updates of frozen weights (LoRA and its kin): (name of a parameter, of what).

    Args:
        model: Layers of PEFT in it are known as such; others by shape: a module that holds one frozen matrix
            ``(m, n)`` and trained ones ``(r, n)`` and ``(m, r)``, in either orientation.
    """
    for name, module in model.named_modules():
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad and p.dim() > 1}
        frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad and p.dim() == 2}
        if trained and (_is_peft(module) or (len(frozen) == 1 and _factors(next(iter(frozen.values())), trained))):
            for factor in trained:
                yield f"{name}.{factor}".lstrip("."), name or "the model"


def _is_peft(module: nn.Module) -> bool:
    library = sys.modules.get("peft.tuners.tuners_utils")
    return library is not None and isinstance(module, library.BaseTunerLayer)


def _factors(base: Tensor, trained: Mapping[str, Tensor]) -> bool:
    shapes = [tuple(p.shape) for p in trained.values() if p.dim() == 2]
    if len(shapes) != len(trained) or len(shapes) % 2:
        return False
    for m, n in (base.shape, base.shape[::-1]):
        ranks = [{s[0] for s in shapes if s[1] == n}, {s[1] for s in shapes if s[0] == m}]
        if any(r < min(m, n) for r in ranks[0] & ranks[1]):
            return True
    return False
