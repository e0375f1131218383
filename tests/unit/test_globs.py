"""Globs of every argument: what they name on nested modules, and that none of them is without effect in silence."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
from grid_models import GridClassifier
from torch import nn
from zoo import Classifier, loader

from lightning_efficient import CollapseMonitor, HESSOPruning, MagnitudePruning, SigmaReparam
from lightning_efficient.common.match import Choice, Globs, NoMatchError, find_module, modules_by_name, select_modules
from lightning_efficient.common.registry import METHODS
from lightning_efficient.functional import apply_temp_scale
from lightning_efficient.lifecycle.methods import callback_class
from lightning_efficient.pruning.targets import find_targets


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.readout = nn.Linear(4, 2)


class Nested(nn.Module):
    """A network inside a network inside a module, as wrappers of trained models make them."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.tower = Tower()
        self.projector = nn.Linear(2, 2)


BOTH = {"include": None, "exclude": None}


def chosen(model: nn.Module, **globs: list[str]) -> list[str]:
    return list(select_modules(model, types=(nn.Linear,), **BOTH | globs, method="M").matched)


TOWER = "student.tower."
READ = {
    "readout": [TOWER + "readout"],
    "tower": [TOWER + "layers.0.0", TOWER + "layers.1.0", TOWER + "readout"],
    "tower.layers.1": [TOWER + "layers.1.0"],
    "layers.*.0": [TOWER + "layers.0.0", TOWER + "layers.1.0"],
    "layers.[1]": [TOWER + "layers.1.0"],
    "projector": ["projector"],
    "*.readout": [TOWER + "readout"],
}


@pytest.mark.parametrize("glob", READ)
def test_a_glob_begins_at_the_root_or_at_the_one_part_that_fits(glob: str) -> None:
    assert chosen(Nested(), include=[glob]) == READ[glob]
    everything = chosen(Nested())
    if READ[glob] != everything:
        assert chosen(Nested(), exclude=[glob]) == [name for name in everything if name not in READ[glob]]


def test_the_root_goes_first() -> None:
    model = Nested()
    model.readout = nn.Linear(2, 2)
    assert chosen(model, include=["readout"]) == ["readout"]


def test_several_parts_that_fit_are_an_error_that_names_them() -> None:
    model = nn.ModuleDict({"encoder": Tower(), "decoder": Tower()})
    with pytest.raises(
        NoMatchError, match=r"'readout' fits 2 parts.*'encoder.readout', 'decoder.readout'.*'\*\.readout'"
    ):
        chosen(model, exclude=["readout"])
    with pytest.raises(NoMatchError, match=r"'layers\.\*\.0' fits 2 parts"):
        chosen(model, include=["layers.*.0"])
    assert len(chosen(model, include=["*.readout"])) == 2


def test_two_names_of_one_module_are_one_part() -> None:
    tower = Tower()
    model = nn.ModuleDict({"a": tower, "b": tower})
    assert chosen(model, include=["readout"]) == ["a.readout"]


def test_a_frozen_reference_network_is_no_second_part() -> None:
    model = nn.ModuleDict({"net": Tower(), "teacher": Tower().eval().requires_grad_(False)})
    assert chosen(model, include=["readout"]) == ["net.readout"]
    assert find_module(model, "readout", "rankme", "M") is model["net"].readout


def test_names_may_hold_what_globs_are_made_of() -> None:
    model = nn.Module()
    model.part = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b*": nn.Linear(2, 2)})
    assert chosen(model, include=["part.a[0]"]) == ["part.a[0]", "part.a0"], "the name itself, and what it matches"
    assert chosen(nn.ModuleDict({"x[1]": model}), include=["part.b*"]) == ["x[1].part.b*"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("raedout", "student.tower.readout"), ("readout.weight", "student.tower.readout"),
        ("tower.layer.0", "student.tower.layers.0"), ("student.tower.layers.*.atn", "student.tower.layers"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_an_error_with_near_misses(argument: str, glob: str, near: str) -> None:
    with pytest.raises(NoMatchError) as caught:
        chosen(Nested(), **{argument: [glob, "projector"]})
    assert f"`{argument}`" in str(caught.value)
    assert repr(glob) in str(caught.value)
    assert near in str(caught.value)


CELLS = [(m, a) for m in METHODS.with_callback for a in ("include", "exclude")]


@pytest.mark.parametrize(("method", "argument"), CELLS)
def test_no_callback_is_silent_about_a_glob_that_matches_nothing(method: str, argument: str) -> None:
    cls = callback_class(method)
    if argument not in inspect.signature(cls).parameters:
        pytest.skip("takes no globs")
    callback = cls(**{argument: ["net.blcks.*.atn"]})
    with pytest.raises(NoMatchError, match=rf"`{argument}`.*'net\.blcks\.\*\.atn' matches no"):
        fit(callback, GridClassifier("grid"))


def fit(callback: Any, model: pl.LightningModule) -> None:
    trainer = pl.Trainer(
        max_epochs=2, limit_train_batches=4, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, loader(), loader())


@pytest.mark.parametrize("wrong", ["head", [""], [3], 3, {"a": 1}.items])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_what_is_no_list_of_globs_is_refused_at_construction(argument: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument}.*expected|{argument}.*write a list|{argument}.*holds"):
        SigmaReparam(**{argument: wrong})


# -- amounts ---------------------------------------------------------------------------------------------------------


def plan(amounts: dict[str, float], **kwargs: Any) -> dict[str, tuple[float, list[str]]]:
    callback = MagnitudePruning(amounts=amounts, **kwargs)
    model = Classifier("cnn")
    callback.plan(model)
    callback._transforms = dict.fromkeys(callback._targets)  # type: ignore[arg-type]
    return callback._groups()


def test_amounts_may_name_the_end_of_a_module() -> None:
    assert plan({"stem": 0.1, "net.head": 0.2}) == {
        "stem": (0.1, ["net.stem.weight"]),
        "net.head": (0.2, ["net.head.weight"]),
        "": (0.5, ["net.conv.weight"]),
    }


@pytest.mark.parametrize(
    ("amounts", "kwargs", "said"),
    [
        ({"hed": 0.1}, {}, r"`amounts` 'hed' matches no module name \(did you mean 'net.head'"),
        ({"bn": 0.1}, {}, r"`amounts` 'bn' covers no weight that is pruned"),
        ({"head": 0.1}, {"exclude": ["head"]}, r"`amounts` 'head' covers no weight that is pruned"),
        ({"net": 0.1, "head": 0.2}, {}, r"`amounts` 'head' .*'net' before it.*first"),
    ],
)
def test_amounts_without_effect_are_an_error(amounts: dict[str, float], kwargs: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(amounts, **kwargs)


# -- the others ------------------------------------------------------------------------------------------------------


def test_rankme_names_a_module_as_globs_do() -> None:
    model = Classifier("encoder")
    assert find_module(model, "head", "rankme", "M") is model.net.head
    with pytest.raises(NoMatchError, match="`rankme` 'linear1' fits 2 parts"):
        find_module(model, "linear1", "rankme", "M")
    with pytest.raises(NoMatchError, match=r"`rankme` 'hed' matches no module name \(did you mean 'net.head'"):
        fit(CollapseMonitor(rankme="hed"), model)


def test_a_monitor_whose_include_has_no_attention_says_so() -> None:
    with pytest.warns(UserWarning, match=r"no attention call.*`include`=\['head'\]"):
        fit(CollapseMonitor(include=["head"], every_n_steps=2), Classifier("encoder"))


def test_attentions_are_named_from_the_part_that_fits() -> None:
    model = Classifier("encoder")
    change = apply_temp_scale(model, 0.5, loader().dataset[:2][0], include=["encoder.layers.1.self_attn"])
    assert list(change.targets) == ["net.encoder.layers.1.self_attn"]


def test_groups_are_named_from_the_part_that_fits() -> None:
    callback = HESSOPruning(include=["stem"], start=0, duration=4, periods=1, target=0.2)
    fit(callback, Classifier("cnn"))
    assert list(callback.groups.found) == ["net.stem"]


def test_parameters_outside_layers_are_names_too() -> None:
    model = Nested()
    model.student.mix = nn.Parameter(nn.init.normal_(nn.Linear(4, 3).weight.clone()))
    choice = Choice.of(model, None, ["mix"], "M", dict(model.named_parameters()))
    assert choice.why_not("student.mix") == "excluded by 'mix'"


def test_pruning_reads_globs_the_same_way() -> None:
    assert list(find_targets(Nested(), include=["readout"]).matched) == [TOWER + "readout.weight"]


def test_hits_come_in_the_order_written() -> None:
    globs = Globs("amounts", ["readout", "tower"], modules_by_name(Nested()), "M")
    assert globs.hits(TOWER + "readout") == ["readout", "tower"]


# -- what else one may have meant ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("zzzzzz", "there are 'student', 'projector'"),
        ("projectr.bias", "did you mean 'projector'"),
        ("LayerNorm", r"is a type, and globs are names \('student.tower.layers.0.1'"),
    ],
)
def test_a_word_that_is_like_no_name_is_answered_with_names(glob: str, said: str) -> None:
    with pytest.raises(NoMatchError, match=said):
        chosen(Nested(), exclude=[glob])


def test_names_below_a_wrapper_are_those_that_one_would_write() -> None:
    with pytest.raises(NoMatchError, match=r"there are 'a.student', 'a.projector'"):
        chosen(nn.ModuleDict({"a": Nested()}), exclude=["zzzzzz"])
