"""The YAML file of the environment switch: what it may say, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_efficient import CollapseMonitor, SigmaReparam
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import build_callback, callback_class, read_methods_file


def write(folder: Path, text: str) -> Path:
    file = folder / "methods.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_arguments_reach_the_callbacks_in_the_order_of_the_methods(tmp_path: Path) -> None:
    text = "collapse_monitor: {every_n_steps: 7}\nsigma_reparam: {init: one, exclude: [head], qkv: split}\n"
    sigma, monitor = read_methods_file(write(tmp_path, text))
    assert isinstance(monitor, CollapseMonitor)
    assert monitor.every_n_steps == 7
    assert isinstance(sigma, SigmaReparam)
    assert sigma.config() == SigmaReparam(init="one", exclude=["head"], qkv="split").config()


@pytest.mark.parametrize(
    ("text", "enabled"), [("true", True), ("false", False), ("", True), ("{}", True), ("{enabled: false}", False)]
)
def test_short_forms(tmp_path: Path, text: str, enabled: bool) -> None:
    (callback,) = read_methods_file(write(tmp_path, f"sigma_reparam: {text}"))
    assert callback.config() == SigmaReparam(enabled=enabled).config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sigma_reparm: true", ["'sigma_reparm'", "did you mean 'sigma_reparam'?)."]),
        ("gradient_descent: true", ["unknown method 'gradient_descent'; expected one of", "collapse_monitor"]),
        ("run_cost: {zzz: 1}", ["has no argument 'zzz'; it has enabled,"]),
        ("sigma_reparam: {inti: one}", ["'inti'", "did you mean 'init'", "`sigma_reparam`"]),
        ("sigma_reparam: {init: two}", ["sigma_reparam: `init` must be one of 'preserve', 'one'; got 'two'."]),
        ("sigma_reparam: {include: 'blocks.*'}", ["sigma_reparam: `include` must be null or a list", "'blocks.*'."]),
        ("sigma_reparam: {exclude: [[head]]}", ["`exclude[0]` must be a string", "got ['head']."]),
        ("sigma_reparam: {enabled: null}", ["sigma_reparam: `enabled` must be true or false; got None."]),
        ("temp_scale: {tau: [1, x]}", ["temp_scale: `tau[1]` must be a finite number; got 'x'."]),
        ("magnitude_pruning: {amounts: {'*': a}}", ["`amounts['*']` must be a finite number; got 'a'."]),
        (f"temp_scale: {{tau: {10**400}}}", ["temp_scale: `tau` must be a finite number", "1000"]),
        ("sigma_reparam: 3", ["`sigma_reparam`", "3", "true, false or a mapping"]),
        ("collapse_monitor: {every_n_steps: 0}", ["`every_n_steps`", "0", "at least 1"]),
        ("- sigma_reparam", ["mapping", "['sigma_reparam']"]),
        ("", ["mapping", "None"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_wrong_file_says_value_expectation_and_key(tmp_path: Path, text: str, said: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=file.name) as error:
        read_methods_file(file)
    assert [part for part in said if part not in str(error.value)] == []


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere/m\.yaml'"):
        read_methods_file("nowhere/m.yaml")


@pytest.mark.parametrize("method", METHODS.with_callback)
def test_every_key_is_its_callbacks_method_and_has_a_switch(method: str) -> None:
    assert callback_class(method).method == method
    assert build_callback(method, False).enabled is False
