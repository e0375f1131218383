"""A norm on its way to becoming another: ``lam · source(x) + (1 - lam) · target(x)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_efficient.common.schema import Number, Record, check
from lightning_efficient.folding.tags import Axis
from lightning_efficient.norms.base import Target
from lightning_efficient.norms.sources import Source

_STATE = Record({"lam": Number(low=0, high=1)})


class BlendNorm(nn.Module):
    """``lerp(target(x), source(x), lam)``, in training and in evaluation alike (progressive norm, arXiv 2405.11582).

    The owner writes ``lam`` with ``lam.fill_(value)`` before a step and calls ``finish()`` once it has reached 0. The
    output has the dtype of the source's output; after ``finish()`` that of the input (they differ only where autocast
    runs the source in float32).

    Inside ``nn.TransformerEncoderLayer`` evaluation has a fast path that reads ``eps``, ``weight`` and ``bias`` of the
    norms and computes LayerNorms itself. It requires that both norms have the same ``eps``: ours is NaN, unequal to
    everything, which needs no hook and survives ``deepcopy``, pickling and ``torch.export``. For the same reason this
    class is no ``nn.LayerNorm``.

    Args:
        source: The norm in place so far; stays a submodule, so that its parameters keep their identity.
        target: The norm to come.
        spec: What ``source`` computes.

    Attributes:
        lam: Weight of the source: a 0-dim float32 buffer that is not saved (it follows from the step) and that casts of
            the module leave alone. 1 until written.
        phase: ``"blend"``, or ``"target"``: the source is no longer computed and its parameters get zero gradients,
            because DistributedDataParallel waits for every parameter it was made with.
        mask: Which rows count in the target's statistics: bool, one for each row in the order of the input without its
            channel axis. Norms on another number of rows (pooled tokens) ignore it. Set before a forward and cleared
            after it, by whoever knows about padding.
    """

    eps = math.nan
    lam: Tensor

    def __init__(self, source: nn.Module, target: Target, spec: Source) -> None:
        super().__init__()
        self.source = source
        self.target = target
        self.spec = spec
        self.phase: Literal["blend", "target"] = "blend"
        self.mask: Tensor | None = None
        self.register_buffer("lam", torch.ones((), dtype=torch.float32), persistent=False)

    @property
    def weight(self) -> Tensor | None:
        """The source's scale parameter, for code that reads ``norm.weight``."""
        return None if self.spec.weight is None else self.source.get_parameter(self.spec.weight)

    @property
    def bias(self) -> Tensor | None:
        """The source's shift parameter, for code that reads ``norm.bias``."""
        return None if self.spec.bias is None else self.source.get_parameter(self.spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, channels on ``spec.axis``."""
        rows = x.movedim(self.spec.axis, -1)
        flat = rows.reshape(-1, self.spec.channels)
        mask = self.mask
        if mask is not None:
            mask = mask.reshape(-1) if mask.numel() == flat.shape[0] else None
        y = self.target(flat, mask).view(rows.shape).movedim(-1, self.spec.axis)
        if self.phase == "target":
            return self._with_zero_gradients(y)
        source: Tensor = self.source(x)
        if self.target.calibrating and self.training:
            seen = source.movedim(self.spec.axis, -1).reshape(flat.shape)
            self.target.calibrate(flat, seen, self.spec.scale(self.source), self.spec.shift(self.source), mask)
        return torch.lerp(y.to(source.dtype), source, self.lam.to(source.dtype))

    @property
    def learns_in_training(self) -> bool:
        """Whether forwards in training mode teach the target something that forwards in evaluation mode do not."""
        return self.target.calibrates or (self.target.batch_statistics and not self.target.frozen)

    def finish(self) -> None:
        """End the transition: only the target from here on (one recompilation of a compiled model)."""
        self.lam.zero_()
        self.phase = "target"

    def resume(self, lam: float) -> None:
        """Be in the transition, at ``lam``."""
        self.phase = "blend"
        self.lam.fill_(lam)

    def get_extra_state(self) -> dict[str, float]:
        """Where the transition stood, so that a file evaluates to the network that was trained."""
        return {"lam": float(self.lam)}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Go there.

        Raises:
            SchemaError: It is no place in a transition.
        """
        check(state, _STATE, "the blend of a norm in the checkpoint")
        self.resume(float(state["lam"]))
        if state["lam"] == 0.0:
            self.finish()

    def recopy(self) -> None:
        """Start the target from the source as it is now; for a transition that begins after a hold or a calibration."""
        self.target.copy_affine(self.spec.scale(self.source), self.spec.shift(self.source))

    def channel_affine(self) -> tuple[Tensor, Tensor, Axis] | None:
        """What the finished norm computes in evaluation, for folding: (scale, shift, channel axis), or None."""
        affine = self.target.affine() if self.phase == "target" or float(self.lam) == 0.0 else None
        return None if affine is None else (affine.scale, affine.shift, 1 if self.spec.axis == 1 else "last")

    def fuse(self) -> nn.Module:
        """The finished norm as a module of torch alone (timm's ``reparameterize_model`` calls this).

        Returns:
            One multiply-add with parameters ``weight`` and ``bias`` where the target is affine in evaluation; else the
            target's formula.

        Raises:
            ValueError: The transition is not over.
        """
        if self.phase != "target" and float(self.lam) != 0.0:
            raise ValueError(
                f"This norm is still {float(self.lam):.3g} of its source, so it has no finished form. Train to the end "
                "of the transition (a shorter `transition` helps), or call finish() to drop the source now."
            )
        return self.target.plain(self.spec.axis).train(self.training)

    def extra_repr(self) -> str:
        """Axis and phase."""
        return f"axis={self.spec.axis}, phase={self.phase!r}"

    def _with_zero_gradients(self, y: Tensor) -> Tensor:
        idle = [p for p in self.source.parameters() if p.requires_grad]
        if not (self.training and idle and torch.is_grad_enabled()):
            return y
        joined: Tensor = _ZeroGradients.apply(y, *idle)
        return joined

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlendNorm:
        lam = self.lam
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A schedule rounded to bfloat16 would move in steps of 1/256.
        device = self.lam.device
        self.lam = torch.ones((), device=device) if lam.is_meta else lam.to(device, torch.float32)
        return self


class _ZeroGradients(torch.autograd.Function):
    """Passes ``y`` through and gives the parameters zeros: unlike ``y + 0 · sum(p)`` also where one is not finite."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.likes = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)


@contextmanager
def finished(norms: Iterable[BlendNorm]) -> Iterator[None]:
    """Evaluate as after the transition: every blend is its target alone, inside this context.

    Args:
        norms: The norms; they compute what they did before afterwards, without being compiled again.
    """
    before = [(norm, norm.lam.clone()) for norm in norms]
    try:
        for norm, _ in before:
            norm.lam.zero_()
        yield
    finally:
        for norm, lam in before:
            norm.lam.copy_(lam)


def set_blend(norms: Iterable[BlendNorm], lam: float, *, recopy: bool = False, calibrate: bool = False) -> None:
    """Put norms where a transition is; at 0 they are finished.

    Args:
        norms: The norms.
        lam: Weight of the source.
        recopy: Start the targets from the sources as they are now.
        calibrate: Whether targets that learn from the source do so.
    """
    for norm in norms:
        if recopy:
            norm.recopy()
        if norm.target.calibrates:
            norm.target.calibrating = calibrate
        if lam > 0:
            norm.resume(lam)
        elif norm.phase != "target":
            norm.finish()


def blend_norms(model: nn.Module) -> dict[str, BlendNorm]:
    """Every ``BlendNorm`` of a model, once, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlendNorm)}
