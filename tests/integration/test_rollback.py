"""A training state that is put back leaves no trace of what was undone, in weights, optimizers and schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from sigma_runs import Do, differing, trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader
from zoo import Classifier, Manual, loader

import lightning_efficient as le
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.rollback import TrainingState, put_back, take_state
from lightning_efficient.testing.checks import flat

FAIRLY = {"val_loss": 2.0}
# Steps that are undone: 4, 5 and 6, in which each of these does something that cannot be taken back.
METHODS: dict[str, tuple[str, Callable[[], Any]]] = {
    "none": ("cnn", lambda: le.RunCost()),
    "sigma_reparam": ("encoder", le.SigmaReparam),
    "norm_swap": ("timm_vit", partial(le.PRepBN, transition=5, hold=1, recalibrate=0)),
    "norm_swap_dyt": ("encoder", partial(le.PRepBN, target="dyt", transition=4, hold=1)),
    "temp_scale": ("encoder", partial(le.TempScale, tau=0.5, transition=6)),
    "temp_scale_learned": ("capped", partial(le.TempScale, tau=0.6, learnable=True)),
    "one_shot": ("cnn", partial(le.MagnitudePruning, amount=0.7, schedule="one_shot", start=5)),
    "cubic": ("timm_vit", partial(le.MagnitudePruning, amount=0.7, start=1, length=7, every=1)),
    "ticket": ("cnn", partial(le.MagnitudePruning, schedule="iterative", rounds=1, rewind_to=1)),
    "taylor": ("cnn", partial(le.MagnitudePruning, amount=0.5, criterion="taylor", start=3, length=4, every=1)),
    "sap": ("cnn", partial(le.SAPPruning, p=1.0, q=2.0, iterations=2)),
    "hesso": ("cnn", partial(le.HESSOPruning, start=1, duration=6, periods=2)),
    "cric": ("cnn", partial(le.HESSOPruning, start=0, duration=9, periods=2, cric=True)),
    "pagcp": ("cnn", partial(le.PAGCPPruning, budgets=FAIRLY, start=5, step=0.25, most=0.5)),
    "two": ("encoder", lambda: (le.SigmaReparam(), le.MagnitudePruning(amount=0.6, start=2, length=5, every=1))),
}
TAKEN, UNDONE, STEPS = 4, 3, 10


def batches(fault: bool) -> list[Any]:
    """Ten of them; with a fault three others after the fourth."""
    good, bad = list(loader(STEPS)), [(1e3 * x, y) for x, y in loader(UNDONE, seed=1)]
    return good[:TAKEN] + (bad if fault else []) + good[TAKEN:]


def run(root: Path, make: Callable[[], Any], module: Any, fault: bool, *more: Any, **kwargs: Any) -> dict[str, Any]:
    """All of the training state after ten steps that count."""
    found: dict[str, Any] = {}
    state: list[TrainingState] = []

    def look(t: Any, m: Any) -> None:
        if fault and t.global_step == TAKEN and not state:
            state.append(take_state(t, m, torch.device("cpu")))
        if fault and t.global_step == TAKEN + UNDONE:
            put_back(state[0], t, m)
            found["back"] = take_state(t, m)
        if t.global_step == STEPS + (UNDONE if fault else 0):
            found["end"] = take_state(t, m)
            t.save_checkpoint(root / f"{fault}.ckpt")

    ours = make()
    listed = (ours,) if not isinstance(ours, tuple) else ours
    t = trainer(root, *listed, *more, Do(on_train_batch_end=look), max_steps=STEPS + UNDONE, **kwargs)
    data = batches(fault) + [batches(False)[-1]] * (0 if fault else UNDONE)
    t.fit(module, DataLoader(data, None), loader(1))  # type: ignore[arg-type]
    if fault:
        before, after = (flat(s.as_plain()) for s in (state[0], found["back"]))
        assert differing(before, after) == []
        moved = {k for k, v in before.items() if not isinstance(v, Tensor) and v == v and after[k] != v}
        assert {k.rpartition("/")[2] for k in moved} <= {"step", "start"}, moved
    return found


@pytest.mark.filterwarnings("ignore:PAGCPPruning pruned nothing")
@pytest.mark.filterwarnings("ignore:.*a pause of the guard")
@pytest.mark.filterwarnings("ignore:PRepBN. .*after step")
@pytest.mark.filterwarnings("ignore:SAPPruning has stalled")
@pytest.mark.filterwarnings("ignore:.*weight.s. altogether")
@pytest.mark.filterwarnings("ignore:.*training ended at step")
@pytest.mark.filterwarnings("ignore:.*estimated")
@pytest.mark.parametrize("method", METHODS)
def test_what_is_undone_leaves_no_trace(method: str, tmp_path: Path) -> None:
    net, make = METHODS[method]
    states, files = [], []
    for fault in (False, True):
        states.append(run(tmp_path, make, Classifier(net), fault)["end"])
        files.append(torch.load(tmp_path / f"{fault}.ckpt", weights_only=True))
    expected, found = (flat(state.as_plain()) for state in states)
    assert differing(expected, found) == []
    masks = [[flat(e.tensors) for e in recipe.read(file)] for file in files]
    assert all(differing(a, b) == [] for a, b in zip(*masks, strict=True))
    for key, saved in states[0].methods.items():
        again = states[1].methods[key]
        assert again["standing"]["start"] == saved["standing"]["start"] + UNDONE


def test_the_gradient_scaler_goes_back(tmp_path: Path) -> None:
    """Infinite gradients halve its scale, and skip the step."""
    scales: list[float] = []
    look = Do(on_train_batch_end=lambda t, m: scales.append(float(t.precision_plugin.scaler.get_scale())))
    state: list[TrainingState] = []

    def back(t: Any, m: Any) -> None:
        if len(scales) == 3:
            state.append(take_state(t, m))
        if len(scales) == 7:
            put_back(state[0], t, m)

    good = list(loader(6))
    data = good[:2] + [(math.inf * x, y) for x, y in good[2:4]] + good[4:]
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    t = trainer(tmp_path, look, Do(on_train_batch_end=back), look, max_steps=6, plugins=[plugin])
    t.fit(Classifier("encoder"), DataLoader(data, None), loader(1))  # type: ignore[arg-type]
    assert scales[6] < scales[2] == scales[7]


def test_averages_other_optimizers_and_buffers_that_are_not_saved(tmp_path: Path) -> None:
    class Cached(Manual):
        def __init__(self) -> None:
            super().__init__("cnn")
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.seen += 1
            super().training_step(batch, batch_idx)

    def ema() -> Any:
        return WeightAveraging(avg_fn=get_ema_avg_fn(0.8))  # type: ignore[no-untyped-call]

    end = [run_manual(tmp_path, Cached(), ema(), fault) for fault in (False, True)]
    assert differing(*end) == []


def run_manual(root: Path, module: Any, ema: Any, fault: bool) -> dict[str, Any]:
    """Two optimizers take two of the Trainer's steps a batch."""
    state: list[TrainingState] = []

    def look(t: Any, m: Any) -> None:
        if fault and t.global_step == 4:
            state.append(take_state(t, m))
        if fault and t.global_step == 8:
            put_back(state[0], t, m)
        seen.append(float(m.seen))

    seen: list[float] = []
    good, bad = list(loader(4)), [(1e3 * x, y) for x, y in loader(2, seed=1)]
    data = good[:2] + (bad if fault else []) + good[2:]
    t = trainer(root, ema, Do(on_train_batch_end=look), max_steps=2 * len(data))
    t.fit(module, DataLoader(data, None), loader(1))  # type: ignore[arg-type]
    assert seen == ([1, 2, 3, 2, 3, 4] if fault else [1, 2, 3, 4])
    return flat(take_state_plain(t, module))


def take_state_plain(t: Any, module: Any) -> dict[str, Any]:
    return {
        "model": dict(module.state_dict()), "optimizers": [copy.deepcopy(o.state_dict()) for o in t.optimizers],
    }  # fmt: skip
