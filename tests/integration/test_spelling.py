"""One spelling everywhere: methods file, environment, EfficientCLI's YAML and options, variants of ablate."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from zoo import Classifier, loader

from lightning_efficient import EfficientCLI
from lightning_efficient._switch import callbacks_from_environment
from lightning_efficient.ablation.variants import read_variants
from lightning_efficient.common.names import VARIABLE
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.methods import _NoDoubles, callback_class, read_methods_file


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)


def write(text: str, name: str = "m.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


@functools.cache
def parser() -> Any:
    """Of ``train.py``: made once, for that takes longer than all the rest."""

    class Made(EfficientCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise StopIteration(parser)

    with pytest.raises(StopIteration) as caught:
        Made(Classifier, pl.LightningDataModule, run=False)
    return caught.value.value


def options(*args: str) -> dict[str, EfficientCallback]:
    """Method → callback, of a configuration that is parsed and not run."""
    vars(parser()).pop("_methods_said", None)
    config = parser().parse_args([*args, "--trainer.logger=false"])
    return {method: callback_class(method)(**config[method].as_dict()) for method in METHODS.with_callback}


def of_yaml(text: str) -> dict[str, EfficientCallback]:
    return options("-c", write(text))


def of_environment(text: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, write(text))
        return {cb.method: cb for cb in callbacks_from_environment()}  # type: ignore[attr-defined]


def of_file(text: str) -> dict[str, Any]:
    return {cb.method: cb for cb in read_methods_file(write(text))}


def of_variant(text: str) -> dict[str, Any]:
    found = read_variants({"one": yaml.safe_load(text)})["one"]
    return of_file(yaml.safe_dump(found))


def of_options(text: str) -> dict[str, Any]:
    """The same as options."""
    args = []
    for key, value in yaml.safe_load(text).items():
        if isinstance(value, dict):
            args += [f"--{key}.{name}={item}" for name, item in value.items()] or [f"--{key}"]
        else:
            args += [f"--{key}"] if value is None else [f"--{key}={str(value).lower()}"]
    return options(*args)


PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "methods file": of_file, "environment": of_environment, "YAML": of_yaml, "options": of_options,
    "variant": of_variant,
}  # fmt: skip
SAID: dict[str, tuple[str, str, bool]] = {
    "a name": ("sigma_reparam: true", "sigma_reparam", True),
    "a class": ("SigmaReparam: true", "sigma_reparam", True),
    "a class whose key is another word": ("PRepBN: true", "norm_swap", True),
    "in small letters": ("prepbn: {transition: 0.5}", "norm_swap", True),
    "in capitals": ("SAPPRUNING: true", "sap_pruning", True),
    "a class with underscores": ("simplified_linear_attention: true", "linear_attention", True),
    "nothing": ("temp_scale:", "temp_scale", True),
    "no arguments": ("TempScale: {}", "temp_scale", True),
    "arguments": ("temp_scale: {tau: 0.5}", "temp_scale", True),
    "the defaults as arguments": ("temp_scale: {tau: 1.0}", "temp_scale", True),
    "switched off": ("Temp_Scale: false", "temp_scale", False),
    "one argument": ("temp_scale.tau: 0.5", "temp_scale", True),
    "one argument of a class": ("TempScale.tau: 0.5", "temp_scale", True),
    "one argument, and switched off": ("temp_scale.tau: 0.5\ntemp_scale: false", "temp_scale", False),
    "a text": ("temp_scale: 'Yes'", "temp_scale", True),
    "arguments, and switched off": ("TempScale: {tau: 0.5, enabled: false}", "temp_scale", False),
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("place", PLACES)
def test_a_method_that_is_named_is_on_unless_it_is_switched_off(place: str, said: str) -> None:
    text, method, enabled = SAID[said]
    found = PLACES[place](text)
    assert found[method].enabled is enabled
    assert [name for name, cb in found.items() if cb.enabled and name != method] == []
    if "0.5" in text:
        config = found[method].config()
        assert 0.5 in (config.get("tau"), config.get("transition"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sigma_reprm: true", "did you mean 'sigma_reparam'?"),
        ("PRepNB: true", "did you mean 'norm_swap', the key of PRepBN?"),
        ("hesso_prunning: {target: 0.5}", "did you mean 'hesso_pruning"),
        ("linearattention2: true", "did you mean 'linear_attention'?"),
    ],
)
def test_a_misspelt_one_is_refused_everywhere_with_the_right_word(
    place: str, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        PLACES[place](text)
    assert said in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("place", ["methods file", "YAML", "variant", "environment"])
def test_two_words_for_one_method_are_refused(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        PLACES[place]("PRepBN: {target: dyt}\nnorm_swap: {init: slab}")
    said = str(caught.value) + capsys.readouterr().err
    assert "norm_swap" in said
    assert "merge them" in said


@pytest.mark.parametrize("method", METHODS.with_callback)
def test_every_method_goes_by_its_class(method: str) -> None:
    name = METHODS[method].class_name
    assert {METHODS.named(key) for key in (method, name, name.lower(), method.upper(), f"package.{name}")} == {method}


ON, OFF = "sigma_reparam: {enabled: true}", "sigma_reparam: {enabled: false, init: one}"
ORDER: dict[str, tuple[list[str], bool]] = {
    "an option of a method that a file switches off": (["-c", "off", "--sigma_reparam.qkv=split"], False),
    "the same the other way round": (["--sigma_reparam.qkv=split", "-c", "off"], False),
    "a file with arguments after one that switches off": (["-c", "off", "-c", "qkv"], False),
    "a file that switches off after one with arguments": (["-c", "qkv", "-c", "off"], False),
    "an option that switches off what a file names": (["-c", "qkv", "--SigmaReparam=false"], False),
    "an option that switches on what a file switches off": (["-c", "off", "--sigma_reparam"], True),
    "switched off before the file": (["--sigma_reparam.enabled=false", "-c", "qkv"], False),
    "the word and its value apart": (["--SigmaReparam", "true", "--sigma_reparam.qkv", "split"], True),
}


@pytest.mark.parametrize("case", ORDER)
def test_what_is_said_of_the_switch_goes_before_what_is_only_named(case: str) -> None:
    texts = {"off": OFF, "on": ON, "qkv": "SigmaReparam: {qkv: split}"}
    args, enabled = ORDER[case]
    callback = options(*[write(texts[arg], f"{arg}.yaml") if arg in texts else arg for arg in args])["sigma_reparam"]
    assert callback.enabled is enabled
    assert ("qkv" in args or any("qkv" in arg for arg in args)) == (callback.config()["qkv"] == "split")


def test_a_section_of_a_subcommand_is_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(EfficientCLI):
        def before_instantiate_classes(self) -> None:
            raise StopIteration(self.config["fit"])

    text = "fit: {PRepBN: {target: dyt}, sigma_reparam: true, temp_scale: {enabled: false}}"
    monkeypatch.setattr(sys, "argv", ["t", "-c", write(text), "fit", "--TempScale.tau=0.5", "--trainer.logger=false"])
    with pytest.raises(StopIteration) as caught:
        Parsed(Classifier, pl.LightningDataModule, seed_everything_default=False)
    config = caught.value.value
    assert config["norm_swap"]["target"] == "dyt"
    assert [name for name in METHODS.with_callback if config[name]["enabled"]] == ["norm_swap", "sigma_reparam"]


def test_the_printed_configuration_says_what_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--prepbn.target=dyt", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["norm_swap"]["enabled"] is True
    assert printed["sigma_reparam"]["enabled"] is False


def test_a_config_given_as_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = {"PRepBN": True, "trainer": {"logger": False}, "model": {"net": "cnn"}}
    made = EfficientCLI(Classifier, pl.LightningDataModule, run=False, args=args, seed_everything_default=False)
    assert [cb.method for cb in made.trainer.callbacks if getattr(cb, "enabled", False)] == ["norm_swap"]


@pytest.mark.parametrize(("key", "meant"), [("hesso", "hesso_pruning"), ("Posterior", "posterior_collapse_monitor")])
def test_a_part_of_a_word_is_answered_with_the_whole(key: str, meant: str) -> None:
    assert f"did you mean {meant!r}" in METHODS.near(key)
    assert METHODS.near("pruning").count(" or ") == 3


@pytest.mark.parametrize("place", ["methods file", "YAML"])
@pytest.mark.parametrize("text", ["temp_scale: {tau: 0.5, tau: 0.9}", "norm_swap: true\nnorm_swap: {target: dyt}"])
def test_a_key_that_is_there_twice_is_refused(place: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        PLACES[place](text)
    said = str(caught.value) + capsys.readouterr().err
    assert re.search(r"the key '(tau|norm_swap)' is there twice", said)


@pytest.mark.parametrize("place", ["methods file", "YAML", "variant"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hesso_pruning: 1", "`hesso_pruning` should be true, false or a mapping of arguments; got 1"),
        ("sap_pruning: [p, q]", "`sap_pruning` should be true, false or a mapping of arguments; got ['p', 'q']"),
        ("temp_scale: {exclude: head}", "`exclude` must be null or a list, each item a string"),
        ("pagcp_pruning: {budgets: [val_loss]}", "`budgets` must be null or a mapping, each key a string"),
        ("norm_swap: {transision: 0.5}", "'transision' (did you mean 'transition'?)"),
    ],
)
def test_what_is_no_mapping_and_no_argument(place: str, text: str, said: str, capsys: Any) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        PLACES[place](text)
    assert said in str(caught.value) + capsys.readouterr().err


def test_a_merged_key_may_be_given_again() -> None:
    assert yaml.load("{a: &a {b: 1, c: 2}, d: {<<: *a, c: 3}}", _NoDoubles)["d"] == {"b": 1, "c": 3}


def test_a_method_without_effect_says_so_when_training_begins() -> None:
    from lightning_efficient import MagnitudePruning, SigmaReparam, TempScale

    def fit(callback: Any) -> None:
        pl.Trainer(
            max_steps=1, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Classifier("encoder"), loader(), loader())  # fmt: skip

    fit(SigmaReparam(monitor_only=True))
    with pytest.warns(UserWarning, match=r"TempScale changes nothing: tau=1.0 is the temperature"):
        fit(TempScale())
    with pytest.warns(UserWarning, match=r"MagnitudePruning changes nothing: amount=0"):
        fit(MagnitudePruning(amount=0.0))
