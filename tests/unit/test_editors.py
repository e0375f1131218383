"""The JSON schema of the methods' keys: it takes what runs, and refuses what does not."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from jsonschema import Draft202012Validator

import lightning_efficient.demo
from lightning_efficient import EfficientCLI
from lightning_efficient.cli import main
from lightning_efficient.cli.editors import json_schema, of_type
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class, read_methods_file

DEMO = Path(lightning_efficient.demo.__file__).parent


@cache
def validator(alone: bool) -> Draft202012Validator:
    schema = json_schema(alone)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def errors(content: Any, alone: bool = True) -> list[str]:
    return [error.message for error in validator(alone).iter_errors(content)]


def test_every_argument_of_every_method_is_described() -> None:
    methods = json_schema()["properties"]
    assert list(methods) == list(METHODS.with_callback)
    for name, method in methods.items():
        arguments = method["anyOf"][-1]["properties"]
        assert set(arguments) == set(inspect.signature(callback_class(name)).parameters)
        assert [a for a, made in arguments.items() if "description" not in made] == [], name
        hints = get_type_hints(callback_class(name).__init__)
        is_open = [a for a, made in arguments.items() if not set(made) - {"description", "default"}]
        assert [a for a in is_open if "Any" not in str(hints[a])] == [], name


@pytest.mark.parametrize("file", sorted(DEMO.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_that_run_pass(file: Path) -> None:
    content = yaml.safe_load(file.read_text("utf-8"))
    assert errors(content, alone=False) == []
    assert errors({"temp_scale": {"tau": [0.5, 1]}, "run_cost": True, "norm_swap": None}) == []


@pytest.mark.parametrize(
    "content",
    [
        {"sigma_reparm": True},
        {"norm_swap": {"trgt": "dyt"}},
        {"norm_swap": {"target": "layer"}},
        {"hesso_pruning": {"periods": "ten"}},
        {"magnitude_pruning": 0.5},
        {"collapse_monitor": {"include": "blocks.*"}},
    ],
)
def test_mistakes_are_found(content: dict[str, Any]) -> None:
    assert errors(content)


@pytest.mark.parametrize(
    "text",
    [
        "StateDriftMonitor: true", "statedriftmonitor: {max_samples: '2'}", "Module-Timer:", "RUNCOST: 'off'",
        "lightning_efficient.PaddingReport: {keeps: 'zero', mask: m}", "__collapse_guard: {enabled: 'No'}",
        "temp_scale: {tau: 5e-1}", "temp_scale: {tau: '[1, 5e-1]'}", "temp_scale: {tau: ['.5', 1_0.0]}",
        "hesso_pruning: {saliency: '{cosine: 1}', periods: '0b11'}", "hesso_pruning: {start: '1e-1', periods: '1_0'}",
        "hesso_pruning: {saliency: {cosine: '1'}}", "padding_report: {d_model: '~'}",
        "state_drift_monitor: {time_axis: '1'}", "PRepBN.transition: 0.5", "prep_bn.target: dyt\nnorm_swap: 'yes'",
        "collapse_monitor: {include: '[blocks.*]', exclude: 'null'}", "collapse_monitor: {include: \"- a\\n- b\"}",
    ],
)  # fmt: skip
def test_whatever_a_file_of_methods_may_say_passes(text: str, tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text(text, encoding="utf-8")
    read_methods_file(file)
    content = yaml.safe_load(text)
    assert errors(content) == []
    assert errors({"fit": content, "trainer.max_epochs": 2, "model": "my.Net", **content}, alone=False) == []


@pytest.mark.parametrize(
    "text",
    [
        "module_timr: {every_n_steps: 2}", "RunCosts: true", "prepbn: {enabled: 'treu'}", "temp_scale: {tau: '5e'}",
        "temp_scale: {tau: ['a']}", "temp_scale.tua: 1", "hesso_pruning: {periods: '1.5'}", "run_cost: 'ture'",
        "hesso_pruning: {saliency: {cosine: x}}", "state_drift_monitor: {time_axis: '2'}", "padding_report: 'null'",
    ],
)  # fmt: skip
def test_what_a_file_of_methods_may_not_say_does_not(text: str, tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=file.stem):
        read_methods_file(file)
    assert errors(yaml.safe_load(text))
    assert errors(yaml.safe_load(text), alone=False)


def test_keys_of_a_configuration_are_those_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert errors({"seed_everythin": 1}, alone=False)
    assert errors({"model": "my.Net", "run_cost": "timing.yaml"}, alone=False) == []
    assert errors({"run_cost": "timing.yaml"}), "only a configuration takes the arguments from a file"
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--print_config"])
    with pytest.raises(SystemExit):
        EfficientCLI()
    keys = yaml.safe_load(capsys.readouterr().out)
    assert errors(dict.fromkeys(keys.keys() - METHODS.keys()), alone=False) == []


def test_types_that_yaml_cannot_write_are_open() -> None:
    assert of_type(int | list[str] | None)["anyOf"][1]["items"] == {"type": "string"}
    assert of_type(Mapping[str, float])["additionalProperties"] == of_type(float)
    assert of_type(Sequence[Literal["a", 1]])["items"] == {"enum": ["a", 1, "1"]}
    assert of_type(Path) == of_type(str | Path) == {}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema"])
    assert json.loads(capsys.readouterr().out) == json_schema()
    main(["schema", "--config", "--out", str(tmp_path / "schema.json")])
    assert str(tmp_path / "schema.json") in capsys.readouterr().out
    assert json.loads((tmp_path / "schema.json").read_text("utf-8")) == json_schema(alone=False)
    with pytest.raises(SystemExit, match="2"):
        main(["schema", "--out", str(tmp_path / "schema.json" / "below")])
    assert "schema.json/below': File exists" in capsys.readouterr().err
