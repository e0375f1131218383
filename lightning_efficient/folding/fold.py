"""Make per-channel affines disappear into the weights around them, and prove that nothing else changed.

Everything is tried on a float64 copy and compared there with the unfolded model; what holds is then written into
the model. SLAB's published merge loses a term (``a * b0``, the bias of the patch embedding) and knows its models by
attribute names; here the readers are found by running the model (``consumers``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_efficient.common.comparing import gap, largest_gap
from lightning_efficient.common.match import canonical_name, modules_by_name
from lightning_efficient.common.running import float64_copy
from lightning_efficient.folding.affine import Affine, ChannelAffine, Edit, FoldPlan, plan
from lightning_efficient.folding.consumers import Consumers, consumers_of
from lightning_efficient.folding.probes import Probe, capture, is_output, others
from lightning_efficient.folding.tags import Axis
from lightning_efficient.surgery.replace import replace_modules, restore_modules

# What is inside the model is compared less strictly: a product may be small through cancellation, and a wrong fold
# is off by far more than rounding.
_INSIDE = 1e-3
_SAME_MODULE = 1e-4  # the affine may have been computed in float32 or from bfloat16 values


@dataclass(frozen=True)
class Folded:
    """What became of one norm.

    Args:
        how: ``"forwards"`` into its readers, ``"backwards"`` into its producer, or ``"left"``: still there.
        into: Modules whose weights took it.
        why: Why it was left, and before that, why not forwards.
    """

    how: Literal["forwards", "backwards", "left"]
    into: tuple[str, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        if self.how == "left":
            return f"left as a fused multiply-add: {self.why}"
        return f"folded {self.how} into {', '.join(self.into)}"


@dataclass(frozen=True)
class FoldReport:
    """What became of each norm, and how it was checked.

    Args:
        norms: Name -> outcome.
        error: Largest difference between the folded and the unfolded model in float64, relative to the scale of
            each output; 0 if nothing was folded.
        checked: Inputs the two were compared at.
        rejected: Other inputs that were tried -> what the model raised.
    """

    norms: dict[str, Folded]
    error: float = 0.0
    checked: tuple[str, ...] = ()
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def folded(self) -> list[str]:
        """Names of the norms that are gone."""
        return [name for name, outcome in self.norms.items() if outcome.how != "left"]

    @property
    def left(self) -> dict[str, str]:
        """Name -> why, for the norms that are still there."""
        return {name: outcome.why for name, outcome in self.norms.items() if outcome.how == "left"}

    def __str__(self) -> str:
        counts = Counter(outcome.how for outcome in self.norms.values())
        lines = [f"{len(self.folded)} of {len(self.norms)} norms folded ({dict(counts)}), error {self.error:.1e}"]
        lines += [f"  {name}: {outcome}" for name, outcome in self.norms.items()]
        lines.append(f"  checked at {', '.join(self.checked) or 'no input'}")
        return "\n".join(lines + [f"  not checked at {kind}: {why}" for kind, why in self.rejected.items()])


def fold_affines(
    model: nn.Module, affines: Mapping[str, Affine], call: Callable[[], Any], *, tolerance: float = 1e-12
) -> FoldReport:
    """Fold modules that compute ``a * x + b`` per channel into the weights that read or feed them.

    Each is folded forwards into every weight that reads it, or else backwards into the one weight that feeds
    it, and replaced by ``nn.Identity``; or else left as it is, for the caller to replace by one fused
    multiply-add. The folded copy is compared with the unfolded one in float64: the outputs and every product
    with a weight, at the given input, at another batch size and, where the model accepts them, at other image
    sizes or lengths. Affines that make a difference are put back, one by one.

    Args:
        model: Changed in place, at the end and only if everything went well; give a copy of one that is still
            needed. Its weights keep their identity, dtype and device; biases are made where needed. Memory:
            one more copy, in float64.
        affines: Module name -> (a ``(C,)``, b ``(C,)``, channel axis of its input: ``"last"`` or 1).
        call: Runs the model once on an example, such as ``lambda: model(x)`` or ``lambda: model(**batch)``;
            the batch may be small.
        tolerance: Largest relative difference that is accepted.

    Returns:
        What became of each.

    Raises:
        ValueError: A name, shape, value or axis is wrong; a module does not compute what its ``a`` and ``b``
            say; ``call`` does not call the model; or the model does not run in float64. Nothing is changed.
    """
    table: dict[str, Affine] = {
        canonical_name(name): (a.detach().double(), b.detach().double(), axis) for name, (a, b, axis) in affines.items()
    }
    _check(model, table)
    if not table:
        return FoldReport({})
    trial = _Trial(model, table, tolerance)
    trial.look(capture(model, call))
    trial.settle([step for name in table if isinstance(step := trial.plan(name), FoldPlan)])
    _finish(model, trial)
    return trial.report()


class _Trial:
    """A float64 copy of the model, folded step by step."""

    def __init__(self, model: nn.Module, affines: Mapping[str, Affine], tolerance: float) -> None:
        self.model, self.copy, self.affines, self.tolerance = model, float64_copy(model), affines, tolerance
        self.axes: dict[str, Axis] = {name: axis for name, (_, _, axis) in affines.items()}
        self.probes: list[tuple[Probe, dict[str, Tensor], dict[str, Consumers]]] = []
        self.rejected: dict[str, str] = {}
        self.outcome: dict[str, Folded] = {}
        self.accepted: list[FoldPlan] = []
        self.kept: list[Edit] = []
        self.error = 0.0

    def look(self, main: Probe) -> None:
        """Trace the unfolded model at ``main`` and at other inputs; keep what it computes there."""
        _check_modules(self.copy, self.affines, main)
        _disable_fast_path(self.copy, self.affines)
        replace_modules(self.copy, {name: ChannelAffine(*affine) for name, affine in self.affines.items()})
        for kind, probe in [("", main), *others(main)]:
            try:
                tracker, values = probe.run(self.copy, self.axes)
            except Exception as error:  # whatever the model raises at an input it does not take
                if not kind:
                    raise
                self.rejected[kind] = _line(error)
                continue
            self.probes.append((probe, values, consumers_of(tracker)))
        noise = self.noise()
        if not noise <= self.tolerance:
            why = (
                f"rounding errors alone change the outputs by {noise:.1e}, more than {self.tolerance:.0e}: they are"
                " random or not finite, or the model magnifies errors, and `tolerance` must be larger"
            )
            self.outcome = {name: Folded("left", why=why) for name in self.affines}

    def noise(self) -> float:
        """How far the unfolded model moves when every scale is off by one rounding error, as folding makes it."""
        modules = modules_by_name(self.copy)
        scales = [modules[name].get_parameter("weight").data for name in self.affines]
        for scale in scales:
            scale[::2] *= 1 + torch.finfo(scale.dtype).eps
        noise = self.compare([])[0]
        for scale, (a, _, _) in zip(scales, self.affines.values(), strict=True):
            scale.copy_(a)
        return noise

    def plan(self, name: str) -> FoldPlan | None:
        """What to try for one norm; None if nothing, and then its outcome is settled."""
        if name in self.outcome:
            return None
        first = self.probes[0][2][name]
        for probe, _, found in self.probes[1:]:
            other = found[name]
            if first.producer != other.producer:
                first = Consumers(first.readers, first.blocked, None)
            if first.blocked is None and (other.blocked is not None or other.readers != first.readers):
                why = f"{other.blocked or 'it is read by other weights'} (with {probe.label})"
                first = Consumers(first.readers, why, first.producer)
        step = plan(name, first, shifts=bool(self.affines[name][1].any()))
        if isinstance(step, FoldPlan):
            return step
        self.outcome[name] = Folded("left", why=step)
        return None

    def settle(self, steps: list[FoldPlan]) -> None:
        """Fold all of them if nothing changes, else each half by itself; a single one that does is put back."""
        if not steps:
            return
        edit = Edit(self.copy)
        for step in steps:
            edit.apply(step, self.affines[step.name])
        swaps = replace_modules(self.copy, {step.name: nn.Identity() for step in steps})
        error, why = self.overflow(edit) or self.compare([*self.accepted, *steps])
        if error <= self.tolerance:
            self.accepted += steps
            self.kept.append(edit)
            self.error = error
            for step in steps:
                into = tuple(dict.fromkeys(weight.module for weight in step.weights))
                self.outcome[step.name] = Folded("backwards" if step.backwards else "forwards", into)
            return
        restore_modules(self.copy, swaps)
        edit.undo()
        if len(steps) == 1:
            why = why or f"folding it changes what the model computes by {error:.1e}, more than {self.tolerance:.0e}"
            self.outcome[steps[0].name] = Folded("left", why=why)
            return
        half = len(steps) // 2
        self.settle(steps[:half])
        self.settle(steps[half:])

    def overflow(self, edit: Edit) -> tuple[float, str] | None:
        """A reason not to go on if a new value does not fit into the model's own dtype."""
        original = Edit(self.model)
        for name in edit.before:
            value, dtype = edit.read(name), original.dtype(name)
            if value is not None and not bool(value.abs().max() <= torch.finfo(dtype).max):
                return float("inf"), f"{name!r} would overflow {dtype}"
        return None

    def compare(self, folded: list[FoldPlan]) -> tuple[float, str]:
        """Largest difference to the unfolded model over all inputs, and what was raised if it did not run.

        Compared are the outputs and, at a thousand times the tolerance, what goes into and comes out of every
        weight: a head of zeros would hide any error from the outputs. Only between a folded norm and its weights
        must something differ.
        """
        read, made = ({w.name for s in folded if s.backwards == back for w in s.weights} for back in (False, True))

        def inside(name: str) -> bool:
            weight, _, call = name.rpartition("#")
            return bool(weight) and weight not in (read if "input" in call else made)

        worst = 0.0
        for probe, before, _ in self.probes:
            try:
                after = probe.run(self.copy, {})[1]
            except Exception as why:  # such as reading an attribute of the norm that is gone
                return float("inf"), f"the model fails without it: {_line(why)}"
            outputs, weights = largest_gap(before, after, is_output), largest_gap(before, after, inside)
            worst = max(worst, outputs, _INSIDE * weights)
        return worst, ""

    def report(self) -> FoldReport:
        """In the order the affines were given."""
        norms = {name: self.outcome[name] for name in self.affines}
        checked = tuple(probe.label for probe, _, _ in self.probes)
        return FoldReport(norms, self.error if self.accepted else 0.0, checked, self.rejected)


def _check(model: nn.Module, affines: Mapping[str, Affine]) -> None:
    modules = modules_by_name(model)
    for name, (a, b, axis) in affines.items():
        if name == "":
            raise ValueError("The model itself cannot be folded into itself; name modules inside it.")
        if name not in modules:
            raise ValueError(f"The model has no module {name!r}; expected names as in `model.named_modules()`.")
        if a.dim() != 1 or a.shape != b.shape:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"{name!r}: a and b have shapes {shapes}; expected (C,) for both.")
        if axis not in ("last", 1):
            raise ValueError(f"{name!r}: axis is {axis!r}; expected 'last' or 1.")
        if not bool(a.isfinite().all() & b.isfinite().all()):
            raise ValueError(f"{name!r}: a or b is not finite; fold a model whose norms have been calibrated.")


def _check_modules(copy: nn.Module, affines: Mapping[str, Affine], main: Probe) -> None:
    """Run the modules that are to be folded, and compare them with what their a and b say."""
    modules = modules_by_name(copy)
    gaps: dict[str, float] = {}

    def watched(name: str) -> Any:
        reference = ChannelAffine(*affines[name])

        def compare(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if bool(x.isfinite().all()):  # else it says nothing about the module; the outputs will not be finite
                gaps[name] = max(gaps.get(name, 0.0), gap(reference.to(x.device)(x.double()), out))

        return modules[name].register_forward_hook(compare, with_kwargs=True)

    handles = [watched(name) for name in affines]
    try:
        main.run(copy, {})
    except Exception as why:  # whatever the model raises in float64
        raise ValueError(f"The model does not run in float64 at the given input: {_line(why)}") from why
    finally:
        for handle in handles:
            handle.remove()
    if off := [name for name, gap in gaps.items() if not gap <= _SAME_MODULE]:
        raise ValueError(
            f"{off[0]!r} does not compute a * x + b with the a and b given: relative difference {gaps[off[0]]:.1e}."
            " Bring it to its finished form first (end of the transition, evaluation mode)."
        )


def _disable_fast_path(model: nn.Module, names: Mapping[str, Any] | list[str]) -> None:
    """Keep ``nn.TransformerEncoder`` from reading ``eps`` and weights of norms that are gone, or from skipping them.

    Its inference fast path is one kernel that contains both norms; a layer says it has none by naming no activation.
    """
    modules = modules_by_name(model)
    gone = {modules[name] for name in names}
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoderLayer) and gone & set(module.children()):
            module.activation_relu_or_gelu = 0
    for module in modules.values():
        if isinstance(module, nn.TransformerEncoder) and gone & set(module.modules()):
            module.use_nested_tensor = False


def _finish(model: nn.Module, trial: _Trial) -> None:
    """Write into the model what the trial has shown to hold."""
    names = [step.name for step in trial.accepted]
    changed = {name for edit in trial.kept for name in edit.before}
    target, source = Edit(model), Edit(trial.copy)
    for name in changed:
        value = source.read(name)
        if value is not None:
            target.write(name, value)
    _disable_fast_path(model, names)
    replace_modules(model, {name: nn.Identity() for name in names})


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
