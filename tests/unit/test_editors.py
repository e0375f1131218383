"""The JSON schema of the methods' keys: it takes what runs, and refuses what does not."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from jsonschema import Draft202012Validator

import lightning_efficient.demo
from lightning_efficient.cli import main
from lightning_efficient.cli.editors import json_schema, of_type
from lightning_efficient.common.registry import METHODS
from lightning_efficient.lifecycle.methods import callback_class

DEMO = Path(lightning_efficient.demo.__file__).parent


def errors(content: Any, alone: bool = True) -> list[str]:
    schema = json_schema(alone)
    Draft202012Validator.check_schema(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(content)]


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


def test_types_that_yaml_cannot_write_are_open() -> None:
    assert of_type(int | list[str] | None) == {
        "anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
    }
    assert of_type(Mapping[str, float]) == {"type": "object", "additionalProperties": {"type": "number"}}
    assert of_type(Sequence[Literal["a", 1]]) == {"type": "array", "items": {"enum": ["a", 1]}}
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
