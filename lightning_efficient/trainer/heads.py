"""Which linear layer is a classifier's head, and which tensor of a batch holds the labels: found by what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_efficient.common.match import NoMatchError, canonical_name
from lightning_efficient.common.nests import named_tensors
from lightning_efficient.common.running import randomness_kept
from lightning_efficient.trainer.replay import Replay, Stage


@dataclass(frozen=True)
class Head:
    """What was found.

    Args:
        name: Of the last linear layer whose output decides the loss.
        labels: Path of the labels in a batch, such as ``"1"`` or ``"target"``.
    """

    name: str
    labels: str


def find_head(
    trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any, name: str | None, labels: str | None
) -> Head:
    """Find the head and the labels, by trying; nothing is logged or counted, and everything is as before.

    The head is the last linear layer that was called whose output, when disturbed, changes the loss (of
    ``training_step``; what the other steps return or log), if with its output held no other linear layer does. The
    labels are integers, one for each row of the head's output, that change the loss and not that output.

    Args:
        trainer: A Trainer inside the stage.
        pl_module: Its module.
        stage: Whose step.
        batch: As the step gets it.
        name: The head, if the user named it.
        labels: The labels, if the user named them.

    Raises:
        NoMatchError: None or several could be it; says which argument names it.
    """
    step = _Step(trainer, pl_module, stage, batch)
    with step.replay.quiet(parameters=False):
        base = step.run()
        found = name if name is not None else _head(step, base)
        return Head(found, labels if labels is not None else _labels(step, base, found))


@dataclass(frozen=True)
class _Outcome:
    values: list[float]
    outputs: dict[str, list[Tensor]]

    def differs(self, other: _Outcome) -> bool:
        pairs = zip(self.values, other.values, strict=False)
        return len(self.values) != len(other.values) or any(abs(a - b) > 1e-6 * max(abs(a), abs(b)) for a, b in pairs)


class _Step:
    """A step that can be run again with outputs of linear layers, or a tensor of the batch, changed."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, batch: Any) -> None:
        self.logged: dict[str, Any] = {}
        self.replay = Replay(trainer, pl_module, stage, lambda key, value, *_, **__: self.logged.update({key: value}))
        self.model, self.stage, self.batch = pl_module, stage, batch
        self.linear = {canonical_name(path): module for path, module in pl_module.named_modules() if _is_linear(module)}

    def run(
        self,
        change: Callable[[str, int, Tensor], Tensor] = lambda name, call, output: output,
        old: Tensor | None = None,
        new: Tensor | None = None,
    ) -> _Outcome:
        batch = apply_to_collection(
            self.batch, Tensor, lambda tensor: new if tensor is old and new is not None else tensor.clone()
        )
        self.logged.clear()
        with randomness_kept(), _changed(self.linear, change) as outputs:
            returned = self.replay.step(batch)
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        known = self.stage == "fit" and isinstance(loss, Tensor)
        nest = {"loss": loss} if known else {"returned": returned, "logged": dict(self.logged)}
        values = [float(t.detach()) for _, t in named_tensors(nest) if t.numel() == 1 and not t.is_complex()]
        return _Outcome(values + [v for v in self.logged.values() if isinstance(v, float)] * (not known), outputs)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


@contextmanager
def _changed(
    linear: Mapping[str, nn.Module], change: Callable[[str, int, Tensor], Tensor]
) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of every linear layer, in the order of the first calls, and what is made of them."""
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in linear.items():

        def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> Any:
            if not isinstance(output, Tensor) or output.shape[-1] not in module.weight.shape:  # type: ignore[operator]
                return None
            calls = outputs.pop(name, [])
            outputs[name] = calls  # the last one called is the last in the order
            changed = change(name, len(calls), output)
            calls.append(changed.detach().clone())
            return changed

        handles.append(module.register_forward_hook(hook))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _disturbed(output: Tensor) -> Tensor:
    """Larger than rounding, and another for each element, so that no norm or softmax takes it out again."""
    wave = torch.arange(output.numel(), device=output.device).view(output.shape).double().sin().to(output.dtype)
    return output + wave * (output.detach().abs().mean() + 0.1)


def _head(step: _Step, base: _Outcome) -> str:
    for name in reversed(base.outputs):
        if not base.differs(step.run(_disturb({name}))):
            continue
        others = set(base.outputs) - {name}
        if base.differs(step.run(_disturb(others, name, base.outputs[name]))):
            also = [n for n in others if base.differs(step.run(_disturb({n}, name, base.outputs[name])))]
            raise NoMatchError(
                f"NeuralCollapseMonitor: the loss depends on {name!r}, and not through it alone: on {sorted(also)} as "
                f"well. Name the classifier: head={name!r}, or another."
            )
        return str(name)
    raise NoMatchError(
        "NeuralCollapseMonitor: no linear layer was found whose output changes what the step returns or logs. Linear "
        f"layers called: {list(base.outputs)}. Name the classifier by `head`."
    )


def _disturb(names: set[str], held: str = "", outputs: Sequence[Tensor] = ()) -> Callable[[str, int, Tensor], Tensor]:
    """Disturbs the outputs of some layers, and gives one layer the outputs that it had."""

    def change(name: str, call: int, output: Tensor) -> Tensor:
        if held and name == held:
            return outputs[call]
        return _disturbed(output) if name in names else output

    return change


def _labels(step: _Step, base: _Outcome, head: str) -> str:
    outputs = base.outputs.get(head)
    if not outputs:
        raise NoMatchError(f"NeuralCollapseMonitor: head={head!r} was not called in the step as a linear layer.")
    classes, shapes = outputs[0].shape[-1], {out.shape[:-1] for out in outputs}
    found, tried = [], []
    for path, tensor in named_tensors(step.batch):
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.shape not in shapes:
            continue
        tried.append(path)
        inside = (tensor >= 0) & (tensor < classes)
        other = step.run(old=tensor, new=torch.where(inside, (tensor + 1) % classes, tensor))
        same = all(torch.equal(a, b) for a, b in zip(outputs, other.outputs.get(head, []), strict=True))
        if same and base.differs(other):
            found.append(path)
    if len(found) == 1:
        return found[0]
    raise NoMatchError(
        f"NeuralCollapseMonitor: the labels are {'one of ' + str(found) if found else 'not found'}: of the batch's "
        f"integers with one for each row of {head!r}, {tried}, {len(found)} change the loss and not the output of the "
        "head. Name them by `labels`, such as '1' or 'target'."
    )
