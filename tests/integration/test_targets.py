"""`lightning-efficient targets` with the inputs it is given: data, shapes, batches of mappings."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from token_models import Classifier, Encoder, TokenData

from lightning_efficient.cli.inputs import inputs_of, read_inputs
from lightning_efficient.cli.targets import show_targets


def shown(*args: str) -> dict[str, str]:
    """Method → what is said of it."""
    console = Console(width=200, record=True, file=io.StringIO())
    show_targets(list(args), console)
    parts = console.export_text().split("\n\n")
    return {part.split()[0]: part for part in parts if part.strip()}


@pytest.fixture(scope="module")
def of_data() -> dict[str, str]:
    return shown("--model=token_models.Classifier", "--data=token_models.TokenData")


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("norm_swap", "encoder.layer.norm1"), ("sigma_reparam", "encoder.mix"),
        ("temp_scale", "encoder.layer.self_attn"),
        ("hesso_pruning", "encoder.layer.linear1"), ("pagcp_pruning", "encoder.layer.linear1"),
        ("magnitude_pruning", "encoder.head.weight"), ("collapse_monitor", "encoder.layer.self_attn"),
    ],
)  # fmt: skip
def test_a_training_step_on_a_batch_of_mappings_decides(of_data: dict[str, str], method: str, found: str) -> None:
    targets = [line for line in of_data[method].splitlines() if line.strip().startswith("✓")]
    assert any(found in line or found.replace("1", "*") in line for line in targets), of_data[method]


def test_nothing_is_left_behind(of_data: dict[str, str]) -> None:
    assert "linear_attention" in of_data
    assert "no timm" in of_data["linear_attention"], "said, not raised: it is off"


def test_a_plain_module_and_a_batch_of_mappings() -> None:
    found = shown("--model=token_models.Encoder", "--data=token_models.TokenData")
    assert "✓ layer.self_attn" in found["temp_scale"]
    assert "✓ mix" in found["sigma_reparam"]


@pytest.mark.parametrize(
    "inputs",
    [
        ["--input", "input_ids=2,6:int", "--input=attention_mask=2,6:mask"], ["--input-shape=2,6:int"],
        ["--input", "2,6:int", "--input", "2,6:mask"],
    ],
)  # fmt: skip
def test_shapes_of_ids_and_masks(inputs: list[str]) -> None:
    found = shown("--model=token_models.Encoder", *inputs)
    assert "✓ layer.self_attn" in found["collapse_monitor"]
    assert "✓ layer.linear1" in found["hesso_pruning"]


def test_without_inputs_it_says_how_to_give_some() -> None:
    assert "--data" in shown("--model=token_models.Encoder")["collapse_monitor"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["1,x"], "'1,x' is not a shape; expected"),
        (["1,-3"], "is not a shape"),
        (["2,3:ints"], "'ints' .did you mean 'int'"),
        (["a=2,3", "4"], "some have no name"),
        (["a=2,3", "a=4"], "the same one"),
        (["a b=2"], "is not a shape"),
    ],
)
def test_wrong_shapes(texts: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_inputs(texts)


def test_inputs_that_the_model_does_not_take_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"Linear does not run on the --input \[0: \(2, 5\) torch.float32\]: Runtime"):
        shown("--model=torch.nn.Linear", "--model.in_features=3", "--model.out_features=4", "--input=2,5")


def test_kinds() -> None:
    read: Any = read_inputs(["x=2,3", "ids=2,5:int", "keep=2,5:mask", "flag=2:bool"])
    assert {name: (tuple(t.shape), t.dtype) for name, t in read.items()} == {
        "x": ((2, 3), torch.float32), "ids": ((2, 5), torch.int64), "keep": ((2, 5), torch.int64),
        "flag": ((2,), torch.bool),
    }  # fmt: skip
    assert read["keep"].all()
    assert read_inputs([]) is None


def test_a_batch_that_no_forward_takes_is_refused_with_what_was_tried() -> None:
    with pytest.raises(ValueError, match=r"Encoder runs on no part of a training batch.*--input"):
        inputs_of(Encoder(), {"pixels": torch.ones(2, 3)})
    assert set(inputs_of(Encoder(), next(iter(TokenData().train_dataloader())))) == {"input_ids", "attention_mask"}
    assert Classifier().encoder is not None
