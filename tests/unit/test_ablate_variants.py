"""Variants of an ablation: grids, names, what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_efficient.ablation.variants import methods_of, options_of, read_variants

ON = {"enabled": True}


def test_the_short_form() -> None:
    assert read_variants(["sigma_reparam", "norm_swap+sigma_reparam"]) == {
        "baseline": {},
        "sigma_reparam": {"sigma_reparam": ON},
        "norm_swap+sigma_reparam": {"norm_swap": ON, "sigma_reparam": ON},
    }


def test_a_file_with_grids(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text(
        """
variants:
  sigma: {sigma_reparam: {init: one, exclude: [head]}}
  without_monitor: {collapse_monitor: false}
  prune:
    sigma_reparam: {grid: [true, false]}
    magnitude_pruning: {amount: {grid: [0.5, 0.9]}, exclude: {grid: [[head], null]}}
""",
        encoding="utf-8",
    )
    found = read_variants(file)
    assert found["sigma"] == {"sigma_reparam": {"enabled": True, "init": "one", "exclude": ["head"]}}
    assert found["without_monitor"] == {"collapse_monitor": {"enabled": False}}
    assert list(found)[3:] == [
        f"prune,sigma_reparam={sigma},amount={amount},exclude={exclude}"
        for sigma in ("true", "false")
        for amount in ("0.5", "0.9")
        for exclude in ("head", "null")
    ]
    assert found["prune,sigma_reparam=false,amount=0.9,exclude=head"] == {
        "sigma_reparam": {"enabled": False},
        "magnitude_pruning": {"enabled": True, "amount": 0.9, "exclude": ["head"]},
    }


def test_options_beside_the_methods_of_a_variant() -> None:
    """A smaller network beside a pruned one, and a learning rate that goes with a method."""
    found = read_variants(
        {
            "small": {"config": {"model.init_args.width": {"grid": [16, 32]}, "trainer.max_epochs": 3}},
            "fast": {"config": {"model": {"lr": 0.5}, "optimizer": "SGD"}, "SigmaReparam": True},
        }
    )
    assert list(found) == ["baseline", *(f"small,model.init_args.width={width}" for width in (16, 32)), "fast"]
    small, fast = found["small,model.init_args.width=32"], found["fast"]
    assert options_of(small) == ["--model.init_args.width=32", "--trainer.max_epochs=3"]
    assert methods_of(small) == {}
    assert options_of(fast) == ['--model={"lr": 0.5}', "--optimizer=SGD"]
    assert methods_of(fast) == {"sigma_reparam": ON}
    assert options_of(found["baseline"]) == []


def test_arguments_of_the_same_name_are_told_apart() -> None:
    both = {
        "sigma_reparam": {"exclude": {"grid": [["a.*"], ["b"]]}},
        "norm_swap": {"exclude": {"grid": [["c"]]}},
    }
    assert list(read_variants({"x": both}))[1:] == [
        "x,sigma_reparam.exclude=a._,norm_swap.exclude=c",
        "x,sigma_reparam.exclude=b,norm_swap.exclude=c",
    ]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["sigma_repram"], r"'sigma_repram': unknown method 'sigma_repram' \(did you mean 'sigma_reparam'\?\)"),
        ({"a": {"sigma_reparam": {"inti": "one"}}}, r"no argument 'inti' \(did you mean 'init'\?\)"),
        ({"a": {"magnitude_pruning": {"amount": "much"}}}, "variant 'a': .*amount"),
        ({"a": {"linear_attention": True, "temp_scale": True}}, "cannot be used together: linear attention has no"),
        ({"a": True}, "should map methods to arguments"),
        ({"a": {"config": {}}}, r"variant 'a': `config` should map options to values.*got \{\}"),
        ({"a": {"config": {"PRepBN": True}}}, "`config` is for what is no method: name 'PRepBN' beside it"),
        ({"a": {"config": {"norm_swap.target": "un"}}}, "name 'norm_swap.target' beside it"),
        ({"baseline": {"sigma_reparam": True}}, "`baseline` is the configuration as it is"),
        ({"seed_1": {"sigma_reparam": True}}, "cannot be a folder"),
        ({"a/b": {"sigma_reparam": True}}, "cannot be a folder"),
        (
            {"a": {"magnitude_pruning": {"amount": {"grid": 0.5}}}},
            r"`magnitude_pruning.amount`: `grid` should be a list",
        ),
        ({"a": {"sigma_reparam": {"exclude": {"grid": [["x*"], ["x?"]]}}}}, "two values of a grid read"),
        (
            {"a,qkv=split": {"sigma_reparam": True}, "a": {"sigma_reparam": {"qkv": {"grid": ["split"]}}}},
            "two variants",
        ),
        ({}, "nothing to compare with the baseline"),
        ({"baseline": {}}, "nothing to compare with the baseline"),
    ],
)
def test_refused(variants: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_variants(variants)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variant: {a: {sigma_reparam: true}}", r"v\.yaml: expected `variants:`"),
        ("variants: [sigma_reparam]", r"got `variants: \['sigma_reparam'\]`"),
        ("variants: {a: {sigma_reparam: true}}\nseed: 1", "unknown key 'seed'"),
        ("variants: {a: [", "not valid YAML"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "v.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_variants(file)
    with pytest.raises(FileNotFoundError, match=r"no file 'nothing\.yaml'"):
        read_variants("nothing.yaml")
