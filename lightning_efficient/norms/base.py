"""What every target norm shares: the gate on its statistics, their precision, and how it ends as a plain module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_efficient.norms.plain import Affine, affine_module


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (always False inside ``torch.compile``).

    A forward that runs then is a recomputation (activation checkpointing, reversible layers). torch has no public
    question for it.
    """
    if torch.compiler.is_compiling():
        return False
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def widened(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it was a narrower floating-point type."""
    return tensor.float() if _is_narrow(tensor) else tensor


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32


def pooled(group: dist.ProcessGroup | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Sums over processes, without a gradient.

    Args:
        group: The processes; None: this one alone.
        values: Sums of what is here, of one dtype.
    """
    if group is None:
        return values
    together = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(together, group=group)
    parts = torch.split(together, [value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values, strict=True))


class Target(nn.Module):
    """A norm that works on rows: (tokens, channels).

    Every floating-point buffer stays in float32 at least, whatever the module is cast to: rounded to the 8 bits of
    bfloat16, running statistics would stop moving.

    Args:
        channels: Size of the channel axis.

    Attributes:
        collect: Whether a forward in training mode may update statistics; a plain attribute, for the owner. A forward
            that repeats an earlier one must not. Those that run inside backward are recognised in eager mode; a
            compiled module cannot tell, so whoever compiles *and* checkpoints closes this gate before each backward
            and opens it after. Several calls in one step (accumulation, a norm used in two places) count each.
        frozen: Train with the running statistics and leave them alone (for batches too small to have any).
        calibrating: Whether the blend shows this target what the source computes; see ``calibrate``.
        group: The processes whose rows all count in the statistics of a batch; None: those of this one alone. All of
            them take part in every forward and backward.
    """

    batch_statistics: ClassVar[bool] = False
    """Whether training normalizes with the statistics of the batch, so that evaluation needs running ones."""

    calibrates: ClassVar[bool] = False
    """Whether ``calibrate`` learns anything."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.collect = True
        self.frozen = False
        self.calibrating = False
        self.group: dist.ProcessGroup | None = None

    @property
    def pools(self) -> bool:
        """Whether statistics are those of several processes together."""
        return self.group is not None

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            x: Rows, (tokens, channels).
            mask: Which rows count in statistics, bool (tokens,); the others are transformed alike. None: all.
        """

    def affine(self) -> Affine | None:
        """Evaluation as ``scale · x + shift`` of each channel, in float64; None where it is no affine map."""
        return None

    def plain(self, axis: int) -> nn.Module:
        """Evaluation as a module of torch alone, with parameters of this module's dtype.

        Args:
            axis: Axis of the channels in its input, -1 or 1.
        """
        affine = self.affine()
        assert affine is not None, "a target that is no affine map says how to become plain"
        return affine_module(affine, axis, like=next(self.parameters()))

    @abstractmethod
    def copy_affine(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Take over a trained norm's scale and shift (None: ones, zeros)."""

    def calibrate(self, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None) -> None:
        """Learn from the source, which turns rows ``x`` into ``y`` with this scale and shift; not all targets do."""

    def begin_recalibration(self) -> None:
        """Forget the running statistics; from here on every forward adds its batch to a plain average."""

    def end_recalibration(self, keep: bool = True) -> bool:
        """Leave the mode that ``begin_recalibration`` entered.

        Args:
            keep: Keep the averages; otherwise, and if no batch had statistics, those of before come back.

        Returns:
            Whether the running statistics are new.
        """
        return False

    def has_statistics(self) -> bool:
        """Whether the running statistics are any but those that every target starts with (waits for the device)."""
        return True

    def collecting(self) -> bool:
        """Whether a forward that happens now may update statistics."""
        return self.collect and not in_backward()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Target:
        before = [(owner, name, b) for owner in self.modules() for name, b in owner.named_buffers(recurse=False)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for owner, name, old in before:
            new = owner.get_buffer(name)
            if _is_narrow(new):
                setattr(owner, name, new.float() if old.is_meta else widened(old).to(new.device))
        return self

    def extra_repr(self) -> str:
        """Channels."""
        return str(self.channels)


class Scaled(Target):
    """A target that ends in ``weight · z + bias``.

    Args:
        channels: Size of the channel axis.
        bias: Whether there is a bias.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)

    @torch.no_grad()
    def copy_affine(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Take over a trained norm's scale and shift (None: ones, zeros); a shift needs a bias."""
        self.weight.copy_(torch.ones_like(self.weight) if scale is None else scale)
        if self.bias is not None:
            self.bias.copy_(torch.zeros_like(self.bias) if shift is None else shift)

    def scaled(self, z: Tensor, scale: Tensor) -> Tensor:
        """``scale · z + bias``, in the dtype of ``z``."""
        y = z * scale if self.bias is None else torch.addcmul(self.bias, z, scale)
        return y.to(z.dtype)
