"""Which strategies a callback works with: refused by name before anything changes, and as the card says."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_efficient import CollapseGuard, MagnitudePruning, RunCost, SAPPruning
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class
from lightning_efficient.lifecycle.strategies import check_schedules, check_strategy, misplaced_states

CARD = Path(__file__).parents[2] / "docs" / "sharded.md"


def run(strategy: Any, precision: str = "32-true", *callbacks: Any) -> Any:
    if isinstance(strategy, type):
        strategy = object.__new__(strategy)
    return SimpleNamespace(strategy=strategy, precision=precision, callbacks=list(callbacks))


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("strategy", "why"),
    [(FSDPStrategy, "one flat vector"), (DeepSpeedStrategy, "steps copies"), (object, "not known")],
)
def test_what_cannot_work_is_refused_by_name(strategy: type, why: str, sharded: bool) -> None:
    match = rf"Mine does not support {strategy.__name__}: .*{why}.*'ddp' \(also 'ddp_spawn'.*Mine\(enabled=False\)"
    with pytest.raises(ValueError, match=match) as caught:
        check_strategy(run(strategy), "Mine", sharded)
    assert ("ModelParallelStrategy works" in str(caught.value)) is sharded


def test_what_works() -> None:
    one = Trainer(accelerator="cpu", devices=1, logger=False).strategy
    for known in (DDPStrategy(), one):
        check_strategy(run(known, "bf16-true", object.__new__(WeightAveraging)), "Mine", False)
    for precision in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
        check_strategy(run(ModelParallelStrategy, precision, object.__new__(EarlyStopping)), "Mine", True)
    with pytest.raises(ValueError, match="Mine does not support ModelParallelStrategy: it needs whole parameters"):
        check_strategy(run(ModelParallelStrategy), "Mine", False)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_narrow_weights_are_refused_where_they_are_cut(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision='{precision}' with ModelParallelStrategy.*bf16-mixed.*mp_policy"):
        check_strategy(run(ModelParallelStrategy, precision), "Mine", True)
    check_strategy(run(ModelParallelStrategy, precision), "Mine", True, weights=False)


@pytest.mark.parametrize(
    "other", [WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging, LearningRateFinder, BatchSizeFinder]
)
def test_what_copies_the_model_is_refused_beside_it(other: type) -> None:
    with pytest.raises(ValueError, match=f"^{other.__name__} .*ModelParallelStrategy"):
        check_strategy(run(ModelParallelStrategy, "32-true", object.__new__(other)), "Mine", True)


class Later(LearningRateFinder):
    """Tries a run in the middle of the fit, when the training state has been read."""

    def on_fit_start(self, *args: Any) -> None: ...


class Sized(BoringModel):
    batch_size, lr = 2, 0.1


@pytest.mark.filterwarnings("ignore:LearningRateFinder runs before")
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder, Later])
@pytest.mark.parametrize("goes_back", [False, True])
def test_a_finder_in_a_resumed_run_is_told(goes_back: bool, finder: type, tmp_path: Path) -> None:
    """Lightning loses the training state then, and begins at step 0."""
    make = partial(SAPPruning, iterations=1) if goes_back else RunCost
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": tmp_path, "limit_train_batches": 2, "limit_val_batches": 0,
    }  # fmt: skip
    first = Trainer(max_epochs=1, callbacks=[make()], **options)
    first.fit(Sized())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = Trainer(max_epochs=2, callbacks=[finder(), make()], **options)
    message = rf"{finder.__name__} tries a run before .* at step 0.* Leave {finder.__name__} out"
    told = pytest.raises(ValueError, match=message) if goes_back else pytest.warns(UserWarning, match=message)
    with told if finder is not Later else nullcontext():
        again.fit(Sized(), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == (0 if goes_back and finder is not Later else 4)


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        (SAPPruning(iterations=2), True),
        (SAPPruning(iterations=0), False),
        (CollapseGuard(), True),
        (CollapseGuard(action="stop"), False),
        (MagnitudePruning(), False),
    ],
)
def test_nothing_goes_back_over_another_schedule(method: Any, refused: bool) -> None:
    swa = StochasticWeightAveraging(swa_lrs=0.1)
    with pytest.raises(ValueError, match=r"StochasticWeightAveraging.*Use WeightAv") if refused else nullcontext():
        method.goes_back and check_schedules(run(None, "32-true", swa), "Mine")


@pytest.mark.parametrize("order", ["the model's", "backwards"])
def test_states_of_optimizers_at_other_parameters(order: str) -> None:
    """Lightning assigns those of an unsharded run by the order of the model's parameters, whatever the optimizer's."""
    module = BoringModel()
    module.second = nn.Linear(32, 2)  # of the same shapes as the first: nothing else would notice
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters[::-1] if order == "backwards" else parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    file = {"optimizer_states": [optimizer.state_dict()]}
    assert misplaced_states(module, [optimizer], file) is (order == "backwards")
    file["optimizer_states"][0]["param_groups"][0]["params"] = [3, 2, 1, 0]  # as a sharded run numbers them
    assert misplaced_states(module, [optimizer], file) is (order != "backwards")


def test_the_card_says_what_the_code_does() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \|$", CARD.read_text("utf-8"), re.MULTILINE)
    works = {name: callback_class(name).sharded for name in METHODS.with_callback}
    assert rows == [(name, "yes", "yes" if yes else "refused", "refused") for name, yes in works.items()]
