"""Norms that become others, in a loop: the core of PRepBN, moved by the driver."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

from lightning_efficient.common.running import Call, device_of
from lightning_efficient.common.schedule import check_spans, transition, transition_steps
from lightning_efficient.loops.parts import Part, Run
from lightning_efficient.loops.processes import check_same_gradients, several
from lightning_efficient.norms.blend import BlendNorm, blend_norms, set_blend
from lightning_efficient.norms.causal import CausalModelError, causal_norms
from lightning_efficient.norms.checks import check_statistics, check_training
from lightning_efficient.norms.padding import Recording, find_padding, hand_over
from lightning_efficient.norms.recalibrate import recalibrate
from lightning_efficient.norms.swap import NormSwapConfig, apply_norm_swap
from lightning_efficient.surgery.replace import restore_modules


class NormSwapPart(Part):
    """See :class:`~lightning_efficient.PRepBN`; without its guard, which judges losses."""

    method = "norm_swap"
    example_for = "whether the model is causal, and what is padding, shows when it runs"
    lengths = (2,)

    def __init__(
        self,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        target: Literal["repbn", "affine", "un", "dyt", "rms"] = "repbn",
        init: Literal["copy", "slab"] = "copy",
        transition: int | float = 0.8,
        shape: Literal["linear", "cosine"] = "linear",
        hold: int | float = 0.05,
        momentum: float = 0.1,
        eps: float = 1e-5,
        decay: float = 0.99,
        alpha: float = 0.5,
        window: int = 4,
        warmup: int = 4000,
        filtration: bool = True,
        learn_eta: bool = True,
        allow_causal: bool = False,
        recalibrate: int = 100,
    ) -> None:
        super().__init__(include, exclude)
        if type(recalibrate) is not int or recalibrate < 0:
            raise ValueError(f"`recalibrate` must be a number of batches from 0; got {recalibrate!r}.")
        self.options = NormSwapConfig(
            target, init, eps, momentum, False, decay, alpha, window, warmup, filtration, learn_eta
        )
        check_spans(hold=hold, transition=transition)
        self.asked, self.shape = (hold, transition), shape
        self.allow_causal, self.recalibrate = allow_causal, recalibrate
        self._norms: dict[str, BlendNorm] = {}
        self._handles: list[Any] = []
        self._fed = self._compared = False

    def resolve(self, total: int | None) -> tuple[int, ...]:
        """First step and number of steps of the way down."""
        hold, length = self.asked
        return transition_steps(total, hold=hold, length=length, names=("hold", "transition"))

    def reshape(self, run: Run) -> None:
        """Swap the norms, then look at what the model does with the example."""
        if swapped := blend_norms(run.model):
            raise ValueError(
                f"norm_swap: the model has {len(swapped)} swapped norms already ({next(iter(swapped))!r})."
            )
        self.change = apply_norm_swap(
            run.model, {**vars(self.options), "include": self.include, "exclude": self.exclude}
        )
        self._norms = blend_norms(run.model)
        batch = any(norm.target.batch_statistics for norm in self._norms.values())
        if batch and several():
            raise ValueError(
                f"norm_swap: target={self.options.target!r} has running statistics, on which processes have to agree, "
                "and a loop does not say when. Use PRepBN in a Lightning Trainer, or target='dyt' or 'rms'."
            )
        if run.parallel and several():
            raise ValueError(
                "norm_swap brings parameters, and a DistributedDataParallel averages the gradients of those that it "
                "was made with: call `attach` with the bare model and optimizer, before they are wrapped "
                "(DistributedDataParallel, `fabric.setup`, `accelerator.prepare`)."
            )
        if batch and self.steps[0] < 1:
            raise ValueError(
                f"norm_swap: `hold`={self.asked[0]!r} is {self.steps[0]} steps of this run, so norms would have no "
                "statistics when the transition begins. Give it in steps, at least hold=1."
            )
        if batch or any(norm.target.calibrates for norm in self._norms.values()):
            self._look(run, batch)

    def _look(self, run: Run, batch: bool) -> None:
        call = run.needs_example(self)

        again, inputs = Recording(run.model, lambda given: Call(*given).run(run.model)), call.on(run.model)
        if batch and not self.allow_causal and (causal := causal_norms(run.model, again, inputs)):
            raise CausalModelError(causal, list(self._norms), self.options.target)
        self._handles = hand_over(run.model, find_padding(run.model, again, inputs).masks)

    def undo(self, run: Run) -> None:
        """Put the old norms back."""
        if self.change is not None:
            restore_modules(run.model, self.change.swaps)
        self.release()

    def lam(self, step: int) -> float:
        """Weight of the old norms after ``step`` optimizer steps."""
        return transition(step, None, hold=self.steps[0], length=self.steps[1], shape=self.shape)

    def at(self, run: Run, step: int) -> None:
        """Set the blend."""
        lam, first = self.lam(step), self.steps[0]
        recopy = self.options.init == "copy" and step == first > 0
        set_blend(self._norms.values(), lam, recopy=recopy, calibrate=lam == 1.0 or (first == 0 and lam > 0.0))
        if lam < 1 and not self._fed:
            check_statistics(run.model, recalibrated=False)
            self._fed = True

    def before_step(self, run: Run, step: int) -> None:
        """Norms have to have seen the batch in training mode."""
        check_training(run.model)
        if not self._compared and self.lam(step) < 1 and several():  # until then they get none
            check_same_gradients([p for norm in self._norms.values() for p in norm.parameters()], self.method)
            self._compared = True

    def finish(self, run: Run, step: int, batches: Iterable[Any] | None, forward: Any) -> str:
        """Average the running statistics anew."""
        lam, some = self.lam(step), any(norm.target.batch_statistics for norm in self._norms.values())
        if some and self.recalibrate and batches is not None:
            recalibrate(run.model, islice(batches, self.recalibrate), device_of(run.model), forward)
        if lam > 0:
            return f"norm_swap is at lam = {lam:.3f}, in the middle of its transition: the old norms are still needed"
        if some and self.recalibrate and batches is None:
            return "norm_swap keeps moving averages as running statistics, as finish(batches=...) was given no batches"
        return ""

    def release(self) -> None:
        """Take the hooks for padding off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
