"""What is said of a wrong argument, for every registered callback: the value, the argument, what was expected."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
import typing
import warnings
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lightning_efficient import (
    AdaptiveGradientModulation,
    CollapseGuard,
    CollapseMonitor,
    Distillation,
    HESSOPruning,
    MagnitudePruning,
    PAGCPPruning,
    PosteriorCollapseMonitor,
    PRepBN,
    RunCost,
    SAPPruning,
    SigmaReparam,
    SimplifiedLinearAttention,
    StateDriftMonitor,
    TempScale,
)
from lightning_efficient.common.arguments import check_call, schema_of
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.schedule import Schedule, moments, transition_steps
from lightning_efficient.common.schema import Anything
from lightning_efficient.lifecycle.methods import callback_class

WRONG = ["0.8", "yes", 0.5j, b"x", object, [1, "a"], {"a": "b"}, (None,), True, 3.5, -7, math.nan, None, np.float32(2)]


def cells() -> list[tuple[str, str, Any]]:
    """Every argument with every value of another type than its annotation's."""
    found = []
    for method in METHODS.with_callback:
        cls = callback_class(method)
        hints = typing.get_type_hints(cls.__init__)
        for argument in inspect.signature(cls).parameters:
            schema = schema_of(hints[argument])
            if not isinstance(schema, Anything):
                found += [(method, argument, value) for value in WRONG if schema.wrong(value) is not None]
    return found


@pytest.mark.parametrize("method", METHODS.with_callback)
def test_a_value_of_another_type_is_refused_at_construction(method: str) -> None:
    mine = [(argument, value) for name, argument, value in cells() if name == method]
    assert mine
    for argument, value in mine:
        with pytest.raises((ValueError, TypeError)) as caught:
            callback_class(method)(**{argument: value})
        said = str(caught.value)
        inside = next(iter(value), "") if isinstance(value, list | tuple) else value
        assert argument in said, (argument, value, said)
        assert any(repr(v) in said for v in (value, inside, *(value.values() if isinstance(value, dict) else ()))) or (
            isinstance(value, list) and "'a'" in said
        ), (argument, value, said)
        assert any(word in said for word in ("should be", "must", "expected", "takes", "write a list")), said


RANGES: list[tuple[type, dict[str, Any], str]] = [
    (TempScale, {"tau": "0.8"}, r"`tau` must be .*; got '0\.8'"),
    (TempScale, {"tau": [1.0, -2.0]}, r"`tau`.*-2\.0.*above 0"),
    (TempScale, {"tau": 0}, r"`tau`.* 0;.*above 0"),
    (TempScale, {"tau": 0.5, "transition": -1}, r"`transition` must not be negative: steps .*; got -1"),
    (TempScale, {"tau": 0.5, "transition": 1.5}, r"`transition` as a fraction .*got 1\.5"),
    (TempScale, {"tau": []}, r"`tau`.* is \[\]; expected a number, or one for each attention"),
    (TempScale, {"mode": "log_n", "length": 1}, r"`length`.* 1; expected .*above 1"),
    (PRepBN, {"transition": 2.0}, r"`transition` as a fraction .*got 2\.0"),
    (PRepBN, {"transition": 1.0}, r"`hold`=0\.05 and `transition`=1\.0 are more than a whole run"),
    (PRepBN, {"hold": -3}, r"`hold` must not be negative.*got -3"),
    (PRepBN, {"shape": "square"}, r"`shape` must be one of 'linear', 'cosine'; got 'square'"),
    (PRepBN, {"guard_length": 0}, r"`guard_length` must .*got 0"),
    (PRepBN, {"guard_factor": 1.0}, r"`guard_factor`.*above 1; got 1\.0"),
    (PRepBN, {"recalibrate": -1}, r"`recalibrate` must .*got -1"),
    (PRepBN, {"momentum": 1.0}, r"`momentum` must .*got 1\.0"),
    (MagnitudePruning, {"amount": 1}, r"`amount` .*; got 1\."),
    (MagnitudePruning, {"amount": -0.25}, r"`amount` .*; got -0\.25"),
    (MagnitudePruning, {"start": 1.25}, r"`start` as a fraction .*got 1\.25"),
    (MagnitudePruning, {"schedule": "one_shot", "start": 1.0}, r"`start`=1\.0 is the end"),
    (MagnitudePruning, {"start": 0.75, "length": 0.5}, r"`start`=0\.75 and `length`=0\.5 are more than a whole run"),
    (MagnitudePruning, {"rewind_to": -2}, r"`rewind_to` must .*got -2"),
    (MagnitudePruning, {"amounts": {"head": 1.5}}, r"`amounts\['head'\]` .*got 1\.5"),
    (MagnitudePruning, {"granularity": "4:2"}, r"`granularity` must .*got '4:2'"),
    (SAPPruning, {"p": 1.5}, r"p.*1\.5"),
    (SAPPruning, {"eta": -0.1}, r"`eta` must .*got -0\.1"),
    (SAPPruning, {"beta": 1.0}, r"`beta` must .*got 1\.0"),
    (SAPPruning, {"tolerance": -0.5, "monitor": "x"}, r"`tolerance` must .*got -0\.5"),
    (SAPPruning, {"iterations": -1}, r"`iterations` must .*got -1"),
    (HESSOPruning, {"target": 1.0}, r"`target` .*got 1\.0"),
    (HESSOPruning, {"start": 0.75, "duration": 0.5}, r"`start`=0\.75 and `duration`=0\.5 are more than"),
    (HESSOPruning, {"duration": -4}, r"`duration` must .*got -4"),
    (HESSOPruning, {"saliency": {"magnitud": 1.0}}, r"'magnitud'.*did you mean 'magnitude'"),
    (HESSOPruning, {"saliency": {"magnitude": -1.0}}, r"magnitude.*-1\.0"),
    (HESSOPruning, {"round_to": 0}, r"`round_to` .*got 0"),
    (PAGCPPruning, {"budgets": {"val_loss": -0.05}}, r"`budgets\['val_loss'\]` .*got -0\.05"),
    (PAGCPPruning, {"budgets": {}}, r"`budgets` .*got \{\}"),
    (PAGCPPruning, {"budgets": {"a": 0.1}, "modes": {"b": "max"}}, r"`modes` names .*'b'"),
    (PAGCPPruning, {"start": 0.8, "every": 0.1, "rounds": 3}, r"`start`=0\.8, `every`=0\.1 and `rounds`=3 .*end"),
    (PAGCPPruning, {"every": -1, "rounds": 2}, r"`every` must .*got -1"),
    (PAGCPPruning, {"topk": 0.0}, r"`topk` .*got 0\.0"),
    (CollapseMonitor, {"every_n_steps": 0}, r"`every_n_steps` is 0; expected at least 1"),
    (CollapseMonitor, {"threshold": 1.0}, r"`threshold` is 1\.0; expected"),
    (RunCost, {"every_n_steps": -5}, r"`every_n_steps` is -5; expected at least 1"),
    (SimplifiedLinearAttention, {"kernel_size": 4}, r"`kernel_size` must be an odd number; got 4"),
    (SimplifiedLinearAttention, {"grid": 0}, r"`grid` must .*got 0"),
    (SigmaReparam, {"qkv": "both"}, r"`qkv` must be one of 'fused', 'split'; got 'both'"),
    (Distillation, {"hold": -1}, r"`hold` must not be negative.*got -1"),
    (Distillation, {"length": 1.5}, r"`length` as a fraction .*got 1\.5"),
    (Distillation, {"schedule": "cosine", "hold": 0.5}, r"`hold`=0\.5 and `length`=1\.0 are more than a whole run"),
    (CollapseGuard, {"snapshot_device": "gpu"}, r"`snapshot_device` must be a device of torch.*got 'gpu'"),
    (CollapseGuard, {"snapshot_device": ""}, r"`snapshot_device` must be a device of torch.*got ''"),
    (CollapseGuard, {"canary": "val"}, r"`canary` must be a batch .*got 'val'"),
    (
        AdaptiveGradientModulation,
        {"modalities": {"a": 0, "b": 1}, "clamp": -1.0},
        r"`clamp` is -1\.0; expected at least 0",
    ),
    (
        AdaptiveGradientModulation,
        {"modalities": {"a": 0, "b": 1}, "start": 5, "end": 3},
        r"`end` is 3; .*5 \(`start`\)",
    ),
    (StateDriftMonitor, {"train_length": 0}, r"`train_length` is 0; expected at least 1"),
]


@pytest.mark.parametrize(("cls", "arguments", "said"), RANGES, ids=lambda v: str(v)[:50])
def test_a_value_out_of_range_is_refused_at_construction(cls: type, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cls(**arguments)


IDLE: list[tuple[type, dict[str, Any], dict[str, Any], str]] = [
    (Distillation, {"hold": 0.5}, {"schedule": "linear", "length": 0.5}, "`hold`=0.5 .*schedule='constant'"),
    (Distillation, {"temperature": 4.0}, {"kind": "kl"}, "`temperature`=4.0 .*kind='mse_logits', only with 'kl'"),
    (PRepBN, {"window": 8, "warmup": 90}, {"target": "un"}, "`window`=8, `warmup`=90 .*target='repbn'"),
    (PRepBN, {"eps": 1e-3}, {"target": "repbn"}, "`eps`=0.001 .*target='rms', only with 'repbn' or 'un'"),
    (PRepBN, {"guard_length": 9}, {"guard": "rollback"}, "`guard_length`=9 .*guard='off'"),
    (TempScale, {"length": 128.0}, {"mode": "log_n"}, "`length`=128.0 .*mode='constant', only with 'log_n'"),
    (MagnitudePruning, {"rounds": 2}, {"schedule": "iterative"}, "`rounds`=2 .*schedule='cubic'"),
    (MagnitudePruning, {"every": 3}, {"schedule": "cubic"}, "`every`=3 .*schedule='one_shot'"),
    (MagnitudePruning, {"seed": 3}, {"criterion": "random"}, "`seed`=3 .*criterion='magnitude'"),
    (SAPPruning, {"iterations": 3}, {}, "`iterations`=3 .*epochs_per_iteration=2, only with None"),
    (SAPPruning, {"tolerance": 0.2}, {"stop_at": "collapse", "monitor": "x"}, "`tolerance`=0.2 .*stop_at='end'"),
    (CollapseGuard, {"lr_factor": 0.5}, {"action": "rollback"}, "`lr_factor`=0.5 .*action='warn'"),
    (SigmaReparam, {"gain_lr": 1.0}, {"learnable_gain": True}, "`gain_lr`=1.0 .*learnable_gain=False"),
    (PosteriorCollapseMonitor, {"prior_std": 2.0}, {}, "`prior_std`=2.0 .*prior_logvar='b'"),
]
BESIDE: dict[str, dict[str, Any]] = {
    "temperature": {"kind": "mse_logits"}, "eps": {"target": "rms"}, "guard_length": {"guard": "off"},
    "every": {"schedule": "one_shot"}, "iterations": {"epochs_per_iteration": 2}, "lr_factor": {"action": "warn"},
    "gain_lr": {"learnable_gain": False}, "prior_std": {"prior_logvar": "b"},
}  # fmt: skip


@pytest.mark.parametrize(("cls", "idle", "active", "said"), IDLE, ids=lambda v: str(v)[:40])
def test_an_argument_that_means_nothing_beside_the_others_is_said(
    cls: type, idle: dict[str, Any], active: dict[str, Any], said: str
) -> None:
    beside = BESIDE.get(next(iter(idle)), {})
    with pytest.warns(UserWarning, match=f"{cls.__name__}: {said}"):
        cls(**idle, **beside)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(**idle, **active)
        cls(**beside)
        cls(enabled=False, **idle, **beside)


@pytest.mark.parametrize("method", METHODS.with_callback)
def test_what_means_something_only_with_others_is_among_the_arguments(method: str) -> None:
    cls = callback_class(method)
    hints = typing.get_type_hints(cls.__init__)
    for other, values, names in cls.only_with:
        schema = schema_of(hints[other])
        assert set(names) <= hints.keys()
        assert not any(schema.wrong(value) for value in values)


@pytest.mark.parametrize("method", METHODS.with_callback)
def test_an_unknown_argument_gets_a_hint(method: str) -> None:
    cls = callback_class(method)
    last = list(inspect.signature(cls).parameters)[-1]
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument '{last}x' \(did you mean '{last}'\?\)"):
        cls(**{f"{last}x": 1})


@pytest.mark.parametrize("method", METHODS.with_callback)
def test_callbacks_copy_and_pickle(method: str) -> None:
    try:
        callback = callback_class(method)()
    except ValueError as error:
        pytest.skip(f"needs arguments: {error}")
    for again in (copy.deepcopy(callback), copy.copy(callback), pickle.loads(pickle.dumps(callback))):
        assert again.config() == callback.config()


SAID_OF_A_RUN: list[tuple[Any, str, str]] = [
    (lambda: Schedule("one_shot", start=100).steps(6), "`start`=100 begins at step 100, but the run has 6", "length"),
    (lambda: Schedule("cubic", start=100).steps(6), "`start`=100 begins at step 100, but the run has 6", "length"),
    (lambda: Schedule("cubic", length=50).steps(6), "`length`=50 ends at step 50, but the run has 6", "start"),
    (lambda: moments(6, 100, 0.1, 1), "`start`=100 is at step 100, but the run has 6", "every"),
    (
        lambda: transition_steps(6, length=9, names=(None, "transition")),
        "`transition`=9 ends at step 9, but the run has 6 steps",
        "hold",
    ),
    (
        lambda: transition_steps(6, hold=5, length=3),
        "`hold`=5 and `length`=3 together end at step 8, but the run has 6 steps",
        "transition",
    ),
]


@pytest.mark.parametrize(("make", "said", "unsaid"), SAID_OF_A_RUN, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_run_that_is_too_short_names_what_was_given(make: Any, said: str, unsaid: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        make()
    assert unsaid not in str(caught.value)


class Takes:
    def __init__(
        self, mode: Literal["a", "b"] = "a", sizes: dict[str, list[int]] | None = None, thing: Any = None
    ) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": {"x": [1, 2.5]}}, r"Takes: `sizes\['x'\]\[1\]` must be a whole number; got 2\.5"),
        ({"sizes": {3: [1]}}, r"Takes: `sizes \(a key\)` must be a string .*; got 3"),
        ({"mode": "c"}, r"`mode` must be one of 'a', 'b'; got 'c'"),
        ({"mode": "x" * 5000}, r"got 'x{150,200}\.\.\."),
        ({"sizes": torch.ones(2)}, r"`sizes` must be null or a mapping.*got tensor"),
        ({"sizes": {"x": [Fraction(1)]}}, r"got Fraction\(1, 1\) \(a fractions\.Fraction\)"),
    ],
)
def test_nested_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_call(Takes, (), arguments)


def test_anything_goes_where_no_type_says_otherwise() -> None:
    check_call(Takes, ("b", {"x": [1]}), {"thing": object()})


@pytest.mark.parametrize(
    ("metric", "better"),
    [("val_top1", "max"), ("val/F1 (macro)", "max"), ("dev_nll", "min"), ("val_loss", "min"), ("zeta", "min")],
)
def test_which_way_a_metric_is_better_is_told_by_its_name(metric: str, better: str) -> None:
    budgets = {metric: 0.1}
    assert PAGCPPruning(budgets=budgets).config()["modes"] == {metric: better}
    assert SAPPruning(monitor=metric, select="best").config()["mode"] == better
    assert CollapseGuard(score=metric).config()["mode"] == better
    for said in ("min", "max"):
        assert PAGCPPruning(budgets=budgets, modes={metric: said}).config()["modes"] == {metric: said}
        assert SAPPruning(monitor=metric, mode=said).config()["mode"] == said
        assert CollapseGuard(score=metric, mode=said).config()["mode"] == said
