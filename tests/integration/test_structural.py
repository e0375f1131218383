"""The structural path: a toy module swap and the removal of norms, through the whole life cycle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cells import rare
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from zoo import Classifier, Lazy, loader

from lightning_efficient import register_method
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.common.change import Change
from lightning_efficient.common.match import select_modules
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.hooks import detach
from lightning_efficient.lifecycle.load import load_from_checkpoint
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.state import attached
from lightning_efficient.lifecycle.structural import StructuralCallback
from lightning_efficient.surgery.replace import replace_modules
from lightning_efficient.testing import assert_method_contract


class ScaledLinear(nn.Module):
    """``y = (gain ∘ weight) x + bias``: other keys, one more parameter, folds exactly."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.raw, self.bias = linear.weight, linear.bias
        self.gain = nn.Parameter(torch.ones(linear.out_features, 1, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.raw * self.gain, self.bias)

    def fold_state(self, live: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {"weight": live["raw"] * live["gain"]}
        return plain | ({"bias": live["bias"]} if "bias" in live else {})

    def unfold_state(self, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        live = {"raw": plain["weight"], "gain": torch.ones_like(plain["weight"][:, :1])}
        return live | ({"bias": plain["bias"]} if "bias" in plain else {})

    def fuse(self) -> nn.Linear:
        linear = nn.Linear(self.raw.shape[1], self.raw.shape[0], bias=self.bias is not None)
        linear.load_state_dict(self.fold_state(dict(self.state_dict())))
        return linear


class ScaleLinears(StructuralCallback):
    method = "toy"

    def apply(self, pl_module: nn.Module) -> Change:
        chosen = select_modules(pl_module, types=(nn.Linear,), include=self.include, exclude=self.exclude, method="toy")
        new = {name: ScaledLinear(module) for name, module in chosen.matched.items()}
        change = Change("toy", targets=dict.fromkeys(new, "scaled"), skipped=dict(chosen.skipped))
        change.added = [(m.gain, m.raw) for m in new.values()]
        change.swaps = replace_modules(pl_module, new)
        return change


@pytest.fixture(autouse=True)
def toy_is_known() -> Iterator[None]:
    """Register the toy for these tests."""
    with METHODS.preserved():
        register_method("toy", ScaleLinears, before="norm_swap", replay="nowhere:never_replayed_because_it_folds")
        yield


def data(batches: int, size: int, dtype: torch.dtype) -> Any:
    return loader(batches, size, dtype=dtype)


SCENARIOS = (
    "plain", "disabled", "rng", "accumulation", "clipping", "bf16_mixed", "compile", "checkpointing", "ema_after",
    "swa", "configure_model", "setup", "resume", "fit_twice_then_test", "weights_only", "ddp",
    "prebuilt_optimizer", "copy_and_pickle",
)  # fmt: skip


class Prebuilt(Classifier):
    """Holds an optimizer that was made before any Trainer."""

    def __init__(self, net: str) -> None:
        super().__init__(net)
        self.made = super().configure_optimizers()

    def configure_optimizers(self) -> Any:
        return self.made


def tail(test: str, cell: dict[str, Any]) -> bool:
    """As in the contract tables: every scenario on one network."""
    return test == "test_a_foldable_swap_keeps_the_contract" and rare(cell["scenario"], cell["net"] == "cnn")


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("net", ["timm_vit", "cnn"])
def test_a_foldable_swap_keeps_the_contract(net: str, scenario: str) -> None:
    modules = {
        "plain": partial(Classifier, net),
        "configure_model": partial(Lazy, net, build="configure_model"),
        "setup": partial(Classifier, net, build="setup"),
        "checkpointing": partial(Classifier, net, checkpointing=True),
        "prebuilt_optimizer": partial(Prebuilt, net),
    }
    table = assert_method_contract(
        partial(ScaleLinears, exclude=["*attn*"] if net == "timm_vit" else None), modules, data, scenarios=[scenario]
    )
    assert table == {scenario: "passed"}


def trainer(tmp_path: Any, *callbacks: Any, **kwargs: Any) -> Any:
    from lightning.pytorch import Trainer

    options = {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, **quiet, **kwargs})


def test_listed_after_averaging_is_refused(tmp_path: Any) -> None:
    t = trainer(tmp_path, WeightAveraging(), ScaleLinears())
    with pytest.raises(ValueError, match="List ScaleLinears before WeightAveraging"):
        t.fit(Classifier("cnn"), loader(), loader(1))


def test_plain_checkpoint_into_a_run_with_the_swap(tmp_path: Any) -> None:
    t, module = trainer(tmp_path), Classifier("cnn")
    t.fit(module, loader(), loader(1))
    t.save_checkpoint(tmp_path / "plain.ckpt")
    expected = t.test(module, loader(), verbose=False)
    again = trainer(tmp_path, ScaleLinears())
    assert again.test(Classifier("cnn"), loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False) == expected


def test_changed_targets_on_resume_are_an_error_that_names_them(tmp_path: Any) -> None:
    t = trainer(tmp_path, ScaleLinears())
    t.fit(Classifier("timm_vit"), loader(), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RecipeError, match=r"ScaleLinears.*configures differently.*Add the same callback"):
        trainer(tmp_path, ScaleLinears(exclude=["*head"])).test(
            Classifier("timm_vit"), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
        )


def test_user_hooks_run_in_order_and_wrappers_can_be_undone(tmp_path: Any) -> None:
    calls: list[str] = []

    class Hooked(Classifier):
        def configure_model(self) -> None:
            calls.append("configure_model")

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            calls.append("save:" + ("plain" if "net.head.weight" in checkpoint["state_dict"] else "live"))

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            calls.append("load:" + ("plain" if "net.head.weight" in checkpoint["state_dict"] else "live"))

    module = Hooked("cnn")
    t = trainer(tmp_path, ScaleLinears())
    t.fit(module, loader(), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, ScaleLinears()).test(Hooked("cnn"), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert calls == ["configure_model", "save:plain", "configure_model", "load:plain"]
    assert attached(module) is not None
    detach(module)
    assert attached(module) is None
    assert not [k for k, v in vars(module).items() if callable(v) and "lightning_efficient" in str(v)]


def test_a_user_wrapper_on_the_instance_is_chained(tmp_path: Any) -> None:
    """LightningCLI puts configure_optimizers on the instance."""
    module, calls = Classifier("cnn"), []

    def configured() -> Any:
        calls.append([n for n, _ in module.named_parameters()])
        return torch.optim.SGD(module.parameters(), lr=0.1)

    module.configure_optimizers = configured
    trainer(tmp_path, ScaleLinears()).fit(module, loader(), loader(1))
    assert "net.head.weight" in calls[0], "the user's code must see the plain view"


# -- remove_norms: does not fold -------------------------------------------------------------------------------------


def test_remove_norms_trains_resumes_and_loads_with_the_helper(tmp_path: Any) -> None:
    make = partial(SigmaReparam, remove_norms=True)
    module = Classifier("timm_vit")
    t = trainer(tmp_path, make())
    t.fit(module, loader(), loader(1))
    assert not [m for m in module.modules() if isinstance(m, nn.LayerNorm)]
    held = {id(p) for g in t.optimizers[0].param_groups for p in g["params"]}
    assert {id(p) for p in module.parameters()} <= held
    t.save_checkpoint(tmp_path / "a.ckpt")

    with pytest.raises(RuntimeError, match="Missing key"):
        Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "a.ckpt")
    assert type(loaded) is Classifier
    x = next(iter(loader()))[0]
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))

    resumed = trainer(tmp_path, make(), max_steps=8)
    fresh = Classifier("timm_vit")
    resumed.fit(fresh, loader(), loader(1), ckpt_path=tmp_path / "a.ckpt")
    whole = Classifier("timm_vit")
    trainer(tmp_path, make(), max_steps=8).fit(whole, loader(), loader(1))
    for (name, a), b in zip(fresh.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_remove_norms_refuses_the_encoder_layer(tmp_path: Any) -> None:
    module = Classifier("encoder")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"remove_norms.*TransformerEncoderLayer.*exclude"):
        trainer(tmp_path, SigmaReparam(remove_norms=True)).fit(module, loader(), loader(1))
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


@pytest.mark.forks
def test_what_does_not_fold_is_refused_under_spawned_processes(tmp_path: Any) -> None:
    t = trainer(tmp_path, SigmaReparam(remove_norms=True), strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"remove_norms does not fold.*strategy='ddp'"):
        t.fit(Classifier("timm_vit"), loader(), loader(1))


def test_recipe_that_names_modules_the_model_lacks(tmp_path: Any) -> None:
    t = trainer(tmp_path, SigmaReparam(remove_norms=True))
    t.fit(Classifier("timm_vit"), loader(), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    entry = next(m for m in content[recipe.KEY]["methods"] if m["method"] == "remove_norms")
    entry["tensors"]["net.blocks.99.norm1"] = {}
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(RecipeError, match=r"Classifier lacks: \['net.blocks.99.norm1'\]"):
        load_from_checkpoint(Classifier, tmp_path / "b.ckpt")
