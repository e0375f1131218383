from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from lightning_efficient.lifecycle.recipe import KEY, VERSION, Entry, RecipeError, read, write


def good() -> dict[str, Any]:
    checkpoint: dict[str, Any] = {}
    tensors = {"net.0.weight": {"gain": torch.ones(1)}}
    write(checkpoint, Entry("sigma_reparam", "SigmaReparam{}", {"qkv": "fused", "exclude": ["a"]}, tensors))
    return checkpoint


def test_round_trip_through_a_safe_file():
    buffer = io.BytesIO()
    torch.save(good(), buffer)
    buffer.seek(0)
    (entry,) = read(torch.load(buffer, weights_only=True))
    assert (entry.method, entry.key) == ("sigma_reparam", "SigmaReparam{}")
    assert entry.config == {"qkv": "fused", "exclude": ["a"]}
    assert torch.equal(entry.tensors["net.0.weight"]["gain"], torch.ones(1))


def test_a_plain_checkpoint_has_no_recipe():
    assert read({"state_dict": {}}) == []


class Bomb:
    """Anything that looks at it more than it should goes off."""

    def __call__(self, *_: object) -> None:
        raise AssertionError("executed")

    __getattr__ = __iter__ = __len__ = __call__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Bomb()"


def edit(**changes: Any) -> dict[str, Any]:
    checkpoint = good()
    checkpoint[KEY]["methods"][0] |= changes
    return checkpoint


BAD = {
    "recipe is a string": ({KEY: "import os"}, "a mapping"),
    "recipe is an object": ({KEY: Bomb()}, "a mapping"),
    "no version": ({KEY: {"methods": []}}, "a whole number"),
    "version is a bool": ({KEY: {"version": True, "methods": []}}, "a whole number"),
    "newer version": ({KEY: {"version": VERSION + 1, "methods": []}}, "Upgrade lightning_efficient"),
    "methods is a mapping": ({KEY: {"version": 1, "methods": {}}}, r"\['methods'\], should be a list of at most 64"),
    "too many methods": ({KEY: {"version": 1, "methods": [{}] * 65}}, "a list of at most"),
    "method is not a mapping": ({KEY: {"version": 1, "methods": ["os.system"]}}, "a mapping"),
    "unknown method": (edit(method="os.system"), "is not known here"),
    "method is an object": (edit(method=Bomb()), "a string"),
    "huge method name": (edit(method="x" * 10**6), "a string up to"),
    "key missing": (edit(key=None), r"\['key'\], should be a string"),
    "config holds an object": (edit(config={"f": Bomb()}), "plain data"),
    "config is nested without end": (edit(config={"a": [[[[[[[[[[1]]]]]]]]]]}), "plain data"),
    "huge config string": (edit(config={"a": "x" * 5000}), "plain data"),
    "tensors is a list": (edit(tensors=[]), "a mapping"),
    "tensors of no axis named": (edit(tensors={"a": {3: torch.ones(1)}}), r"\['a'\] \(a key\), should be a string"),
    "sparse tensor": (
        edit(tensors={"a": {"gain": torch.ones(1).to_sparse()}}),
        r"\['a'\]\['gain'\], should be a tensor",
    ),
    "an unknown field": (edit(pickle="x"), "a known field"),
    "the same method twice": ({KEY: {"version": 1, "methods": good()[KEY]["methods"] * 2}}, "more than once"),
    "tensor is a list": (edit(tensors={"a": {"gain": [1.0]}}), "a tensor"),
    "tensor subclass": (edit(tensors={"a": {"gain": torch.nn.Parameter(torch.ones(1))}}), "a tensor"),
    "huge tensor name": (edit(tensors={"a" * 10**6: {}}), "a string up to"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_refused(name: str):
    checkpoint, message = BAD[name]
    with pytest.raises(RecipeError, match=message) as caught:
        read(checkpoint)
    assert len(str(caught.value)) < 600, "an error message must stay readable"
