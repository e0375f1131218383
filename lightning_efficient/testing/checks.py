"""What the scenarios assert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_efficient.common.comparing import difference
from lightning_efficient.lifecycle.hooks import fold_modules
from lightning_efficient.testing.case import Case, ResumableLoader


def assert_resume_exact(
    case: Case,
    variant: str = "plain",
    callbacks: Callable[[], tuple[Callback, ...]] | None = None,
    steps: int | None = None,
    **kwargs: Any,
) -> None:
    """Stopped in the middle of an epoch and resumed equals uninterrupted, on every tensor of the checkpoint.

    Args:
        case: The cell.
        variant: Of the module.
        callbacks: Makes those of a run; None: the case's own.
        steps: Optimizer steps of the whole run; None: the case's.
        kwargs: Further arguments of the Trainer. With ``max_epochs`` its length is that, and ``steps`` only says where
            the middle is.
    """
    make = callbacks or case.ours
    total = steps or case.steps
    length: dict[str, Any] = {"max_steps": -1 if "max_epochs" in kwargs else total}

    def run(name: str, *more: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        trainer = case.trainer(*make(), *more, **length, **kwargs)
        torch.manual_seed(0)
        case.train(trainer, case.modules[variant](), ResumableLoader(case.data()), ckpt_path=ckpt_path)
        trainer.save_checkpoint(case.root / name)
        return flat(torch.load(case.root / name, weights_only=True))

    class Halfway(Callback):
        """Saves in the middle of the epoch, as a run that is killed there has done."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == total // 2:
                trainer.save_checkpoint(case.root / "half.ckpt")

    whole = run("whole.ckpt", Halfway())
    resumed = run("resumed.ckpt", ckpt_path=case.root / "half.ckpt")
    shared = {k for k in whole if isinstance(whole[k], Tensor)}
    assert shared == {k for k in resumed if isinstance(resumed[k], Tensor)}
    assert_equal({k: whole[k] for k in shared}, {k: resumed[k] for k in shared})


def plain_state(module: LightningModule) -> dict[str, Any]:
    """The module's state under the user's own keys."""
    plain = deepcopy(module)
    fold_modules(plain)
    return plain.state_dict()


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping, keys joined by slashes."""
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in items:
        out |= flat(item, f"{prefix}/{key}")
    return out


def saved(trainer: Trainer, case: Case) -> dict[str, Any]:
    """What the Trainer writes, read back safely."""
    trainer.save_checkpoint(case.root / "saved.ckpt")
    return dict(torch.load(case.root / "saved.ckpt", weights_only=True))


def inner(module: LightningModule) -> nn.Module:
    """The network inside the LightningModule."""
    return next(iter(module.children()))


def check_optimizer(trainer: Trainer, module: LightningModule) -> None:
    """Every trainable parameter is in the optimizers, exactly once."""
    held = [id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)), "a parameter is in the optimizers twice"
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    assert not names, f"in no optimizer: {names}"


def assert_moved(before: nn.Module, after: nn.Module) -> None:
    """Every parameter that got gradients differs from its initial value."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    still = [n for n in old if n in new and new[n].grad is not None and torch.equal(old[n], new[n])]
    assert not still, f"never trained: {still}"


def assert_finite(module: nn.Module) -> None:
    """No parameter is NaN or infinite."""
    bad = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    assert not bad, f"not finite: {bad}"


def assert_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Same names, equal tensors."""
    assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())[:6]}"
    bad = [k for k in a if isinstance(a[k], Tensor) and not torch.equal(a[k], b[k])]
    assert not bad, f"differ: {bad[:6]} ({len(bad)} of {len(a)})"


def assert_close(a: Mapping[str, Any], b: Mapping[str, Any], bound: float) -> None:
    """Same names, tensors within an absolute bound."""
    assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())[:6]}"
    a, b = ({k: v for k, v in state.items() if isinstance(v, Tensor)} for state in (a, b))
    worst = {k: difference(a[k], b[k]).absolute for k in a}
    name = max(worst, key=lambda k: worst[k])
    assert worst[name] <= bound, f"{name} differs by {worst[name]:.2e}, allowed {bound:.0e}"
