"""Resuming a run whose method replaced modules: what is missing or different is named, not torch's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from grid_models import GridClassifier
from zoo import Classifier, loader

from lightning_efficient import PRepBN, RecipeError, RunCost, SigmaReparam, SimplifiedLinearAttention


def trainer(folder: Path, *callbacks: Any, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, limit_train_batches=4, limit_val_batches=1, logger=False,
        callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, accelerator="cpu",
    )  # fmt: skip


SWAP = {"transition": 2, "hold": 0}
MADE: dict[str, tuple[Any, Any]] = {
    "norm_swap": (lambda **more: PRepBN(**{"target": "dyt", **SWAP, **more}), lambda: Classifier("encoder")),
    "linear_attention": (
        lambda **more: SimplifiedLinearAttention(**{"kernel_size": 3, **more}),
        lambda: GridClassifier("grid"),
    ),
}


@pytest.fixture(scope="module", params=MADE)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    make, model = MADE[request.param]
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, make())
    run.fit(model(), loader(), loader())
    path = str(folder / "last.ckpt")
    run.save_checkpoint(path)
    return make, model, path


def resume(path: str, model: Any, tmp_path: Path, *callbacks: Any) -> None:
    trainer(tmp_path, *callbacks, epochs=2).fit(model, loader(), loader(), ckpt_path=path)


def test_the_same_callback_goes_on(written: Any, tmp_path: Path) -> None:
    make, model, path = written
    resume(path, model(), tmp_path, make())


OTHERS: dict[str, dict[str, Any]] = {
    "norm_swap": {"target": "repbn"}, "linear_attention": {"kernel_size": 5},
}  # fmt: skip


def test_another_value_of_an_argument_is_named(written: Any, tmp_path: Path) -> None:
    make, model, path = written
    ((argument, value),) = OTHERS[make().method].items()
    then = make().config()[argument]
    with pytest.raises(RecipeError, match=rf"`{argument}`: {then!r} then, {value!r} now") as caught:
        resume(path, model(), tmp_path, make(**{argument: value}))
    assert type(make()).__name__ in str(caught.value)


@pytest.mark.parametrize("other", [RunCost, SigmaReparam])
def test_a_missing_callback_is_named_with_its_arguments(written: Any, tmp_path: Path, other: Any) -> None:
    make, model, path = written
    (argument,) = OTHERS[make().method]
    call = f"{type(make()).__name__}\\(.*{argument}={make().config()[argument]!r}"
    with pytest.raises(RecipeError, match=call):
        resume(path, model(), tmp_path, other())


def test_without_any_callback_of_ours_torch_says_which_one(written: Any, tmp_path: Path) -> None:
    make, model, path = written
    with pytest.raises(RuntimeError, match=rf"this needs {type(make()).__name__}\("):
        resume(path, model(), tmp_path)
    with pytest.raises(RuntimeError, match=rf"this needs {type(make()).__name__}\("):
        model().load_state_dict(torch.load(path, weights_only=True)["state_dict"])


def test_evaluation_names_it_too(written: Any, tmp_path: Path) -> None:
    make, model, path = written
    with pytest.raises(RecipeError, match=rf"{type(make()).__name__}\("):
        trainer(tmp_path, RunCost()).validate(model(), loader(), ckpt_path=path)
