"""SimplifiedLinearAttention in a Trainer: beside other methods, in files, from YAML, over processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import Ended, forked, fresh
from grid_models import GridClassifier, grid_vit
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from zoo import Classifier, loader

from lightning_efficient import PRepBN, SigmaReparam, SimplifiedLinearAttention, export, load_from_checkpoint
from lightning_efficient.attention.linear import LinearAttention
from lightning_efficient.cli.targets import planned
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.lifecycle.methods import build_callback
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.lifecycle.state import Attachment, attachment
from lightning_efficient.testing.case import ResumableLoader

SCRIPT = Path(__file__).parent / "scripts" / "linear_attention_ddp.py"
NEW = ("position", "dwc.weight", "dwc.bias")


def trainer(tmp_path: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, **quiet, **kwargs})


def swapped(module: nn.Module) -> dict[str, LinearAttention]:
    return {name: m for name, m in module.named_modules() if isinstance(m, LinearAttention)}


def test_new_parameters_train_without_decay_at_their_projections_rate(tmp_path: Any) -> None:
    module = GridClassifier("grid")
    t = trainer(tmp_path, SimplifiedLinearAttention())
    t.fit(module, loader(batches=8), loader(1))
    groups = {id(p): group for group in t.optimizers[0].param_groups for p in group["params"]}
    assert len(swapped(module)) == 2
    for layer in swapped(module).values():
        for name in NEW:
            group = groups[id(layer.get_parameter(name))]
            assert group["weight_decay"] == 0.0
            assert group["lr"] == groups[id(layer.qkv.weight)]["lr"]
        assert layer.position.abs().max() > 0


def test_it_learns(tmp_path: Any) -> None:
    batch = loader(batches=1, size=16)
    module = GridClassifier("grid", lr=1e-2)
    t = trainer(tmp_path, SimplifiedLinearAttention(), max_steps=60)
    t.fit(module, batch, loader(1))
    assert t.callback_metrics["train_loss"] < 0.1


OTHERS: dict[str, Any] = {"sigma": SigmaReparam, "norms": lambda: PRepBN(transition=3, hold=1)}


def tail(test: str, cell: dict[str, Any]) -> bool:
    """Norms inside the attention meet it in either order; for the rest one order of them is enough."""
    return test == "test_with_another_method_in_either_order" and cell["net"] == "pairs" and cell["other"] == "sigma"


@pytest.mark.filterwarnings("ignore:SigmaReparam leaves 2 weight.*dwc.weight .in no optimizer")  # tested below
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("net", ["grid", "pairs"])
def test_with_another_method_in_either_order(tmp_path: Any, other: str, first: bool, net: str) -> None:
    """Trained, saved, loaded, exported and resumed; ``pairs`` has query-key norms, which PRepBN swaps inside ours."""

    def callbacks() -> list[Callback]:
        both = [SimplifiedLinearAttention(), OTHERS[other]()]
        return both if first else both[::-1]

    whole = GridClassifier(net)
    t = trainer(tmp_path, *callbacks())
    t.fit(whole, loader(batches=8), loader(1))
    assert len(swapped(whole)) == 2
    t.save_checkpoint(tmp_path / "a.ckpt")
    x = next(iter(loader()))[0]
    loaded = load_from_checkpoint(GridClassifier, tmp_path / "a.ckpt").eval()
    assert torch.equal(loaded(x), whole.eval()(x))
    plain = export(whole, x)
    torch.testing.assert_close(plain(x), whole(x), rtol=0, atol=1e-5)
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} <= {"torch", "timm", "grid_models"}
    kinds = {type(m) for n, m in plain.named_modules() if n.endswith(("norm1", "norm2", ".norm", "fc_norm"))}
    assert (kinds == {nn.Identity}) is (other == "norms")

    class Half(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer(tmp_path, *callbacks(), Half()).fit(GridClassifier(net), ResumableLoader(loader(batches=8)), loader(1))
    resumed = GridClassifier(net)
    again = trainer(tmp_path, *callbacks())
    again.fit(resumed, ResumableLoader(loader(batches=8)), loader(1), ckpt_path=tmp_path / "half.ckpt")
    for (name, a), b in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.mark.parametrize("first", [True, False])
def test_sigma_reparam_works_on_the_reused_weights_and_the_new_in_either_order(tmp_path: Any, first: bool) -> None:
    module = GridClassifier("grid")
    callbacks = [SigmaReparam(qkv="split"), SimplifiedLinearAttention()]
    t = trainer(tmp_path, *callbacks[:: 1 if first else -1])
    t.fit(module, loader(batches=8), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    methods = torch.load(tmp_path / "a.ckpt", weights_only=True)["lightning_efficient"]["methods"]
    (entry,) = [m for m in methods if m["method"] == "sigma_reparam"]
    names = {name for name in entry["tensors"] if "blocks.0.attn" in name}
    assert names == {f"net.blocks.0.attn.{name}.weight" for name in ("qkv", "proj", "dwc")}


# -- files


def test_evaluation_without_the_callback_is_an_error_never_other_numbers(tmp_path: Any) -> None:
    module = GridClassifier("grid")
    t = trainer(tmp_path, SimplifiedLinearAttention(kernel_size=3))
    t.fit(module, loader(), loader(1))
    path = tmp_path / "a.ckpt"
    t.save_checkpoint(path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*position"):
        trainer(tmp_path).test(GridClassifier("grid"), loader(), ckpt_path=path, verbose=False)
    other = SimplifiedLinearAttention(exclude=["net.blocks.0"])
    with pytest.raises(RecipeError, match="Add the same callback with the same arguments"):
        trainer(tmp_path, other).test(GridClassifier("grid"), loader(), ckpt_path=path, verbose=False)
    loaded = load_from_checkpoint(GridClassifier, path)
    assert {layer.dwc.kernel_size for layer in swapped(loaded).values()} == {(3, 3)}


def test_a_plain_checkpoint_does_not_load_into_a_run_with_the_swap(tmp_path: Any) -> None:
    t = trainer(tmp_path)
    t.fit(GridClassifier("grid"), loader(), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RecipeError, match="written without SimplifiedLinearAttention"):
        trainer(tmp_path, SimplifiedLinearAttention()).test(
            GridClassifier("grid"), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
        )


# -- refusals and configuration


def test_a_model_it_does_not_suit_is_refused_untouched(tmp_path: Any) -> None:
    module = Classifier("timm_vit")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(NoMatchError, match=r"1 class, register or distillation tokens.*class_token=False"):
        trainer(tmp_path, SimplifiedLinearAttention()).fit(module, loader(), loader(1))
    assert not swapped(module)
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


def test_the_methods_file_and_the_table_of_targets() -> None:
    callback = build_callback("linear_attention", {"kernel_size": 3, "grid": 4, "exclude": ["blocks.1"]})
    assert isinstance(callback, SimplifiedLinearAttention)
    assert callback.config() == {
        "enabled": True, "include": None, "exclude": ["blocks.1"], "kernel_size": 3, "grid": 4, "eps": 1e-6,
    }  # fmt: skip
    model = grid_vit()
    change = planned(callback, model)
    assert change.targets == {"blocks.0.attn": "Attention becomes linear on 4×4 tokens"}
    assert change.skipped == {"blocks.1.attn": "excluded by 'blocks.1'"}
    assert not swapped(model)
    for name, value in (("kernel_size", 4), ("kernel_size", "five"), ("grid", 0), ("eps", 0.0)):
        with pytest.raises(ValueError, match=name):
            build_callback("linear_attention", {name: value})


def test_the_report_of_the_run(tmp_path: Any) -> None:
    module = GridClassifier("grid")
    trainer(tmp_path, SimplifiedLinearAttention(include=["net.blocks.1"])).fit(module, loader(), loader(1))
    mine = attachment(module)
    assert isinstance(mine, Attachment)
    (change,) = mine.changes
    assert change.report().splitlines() == [
        "linear_attention: 1 modules changed, 1 skipped",
        "  Attention becomes linear on 4×4 tokens: 1 (net.blocks.1.attn)",
        "  skipped, not covered by include: 1 (net.blocks.0.attn)",
        "  parameters: 3 added",
    ]


# -- processes


@pytest.mark.forks
def test_spawned_processes_are_refused_because_it_does_not_fold(tmp_path: Any) -> None:
    t = trainer(tmp_path, SimplifiedLinearAttention(), strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"linear_attention does not fold.*strategy='ddp'"):
        t.fit(GridClassifier("grid"), loader(batches=8), loader(2))


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("start", [forked, pytest.param(fresh, marks=pytest.mark.exhaustive)])
def test_two_processes_equal_one_on_both_batches(start: Callable[..., Ended], tmp_path: Path) -> None:
    """Plain DDP, float64: the processes start from different seeds, and end as one process does."""
    for processes in (1, 2):
        ended = start(SCRIPT, tmp_path, processes, processes=processes)
        assert ended.code == 0, ended.output
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2))
    assert "net.blocks.0.attn.position" in one
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9, msg=name)
