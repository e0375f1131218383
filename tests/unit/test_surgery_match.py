"""Selecting modules: globs, types, second names, wrappers, and each kind of error."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_efficient.common.match import (
    NoMatchError,
    canonical_name,
    covers,
    modules_by_name,
    select_modules,
)
from lightning_efficient.common.near import near_names


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = Attention()
        self.fc = nn.Linear(4, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10)


LINEARS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "fc")] + ["head"]


def select(model, include=None, exclude=None, types=(nn.Linear,)):
    return select_modules(model, types=types, include=include, exclude=exclude, method="sigma_reparam")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.attn", "blocks.0.attn"),
        ("", ""),
        ("_orig_mod", ""),
        ("_orig_mod.blocks.0._checkpoint_wrapped_module.attn.weight", "blocks.0.attn.weight"),
        ("a._fsdp_wrapped_module._orig_mod.b", "a.b"),
        ("my_orig_mod.x", "my_orig_mod.x"),
    ],
)
def test_canonical_name(name, expected):
    assert canonical_name(name) == expected


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("blocks.0", "blocks.0.attn.qkv", True),
        ("blocks.0", "blocks.0", True),
        ("blocks.0", "blocks.01.attn", False),
        ("*.attn", "blocks.0.attn.qkv", True),
        ("*.attn", "blocks.0.fc", False),
        ("attn", "blocks.0.attn", False),
        ("Blocks.0", "blocks.0", False),
        ("blocks.[01].fc", "blocks.1.fc", True),
        ("*", "head", True),
        ("*", "", True),
        ("head", "", False),
    ],
)
def test_a_glob_covers_what_it_names_and_everything_below(glob, name, expected):
    assert covers(glob, name) is expected


def test_no_globs_select_every_module_of_the_types_in_order():
    model = Net()
    selection = select(model)
    assert list(selection.matched) == LINEARS
    assert all(selection.matched[name] is model.get_submodule(name) for name in LINEARS)
    assert selection.skipped == {}
    assert selection.aliases == {}


def test_the_root_itself_can_match():
    layer = nn.Linear(2, 2)
    assert select(layer).matched == {"": layer}


def test_include_and_exclude_with_reasons():
    selection = select(Net(), include=["blocks.*"], exclude=["*.attn", "blocks.1"])
    assert list(selection.matched) == ["blocks.0.fc"]
    assert selection.skipped == {
        "blocks.0.attn.qkv": "excluded by '*.attn'",
        "blocks.0.attn.proj": "excluded by '*.attn'",
        "blocks.1.attn.qkv": "excluded by '*.attn'",
        "blocks.1.attn.proj": "excluded by '*.attn'",
        "blocks.1.fc": "excluded by 'blocks.1'",
        "head": "not covered by include",
    }


def test_a_shared_module_appears_once_and_any_of_its_names_counts():
    model = Net()
    model.decoder = nn.ModuleDict({"out": model.head})
    selection = select(model)
    assert list(selection.matched) == LINEARS
    assert selection.aliases == {"head": ["decoder.out"]}
    assert list(select(model, include=["decoder"]).matched) == ["head"]
    assert "head" not in select(model, exclude=["decoder.*"]).matched


@pytest.mark.parametrize("include", [None, ["blocks.0"], ["blocks.0.attn", "*.fc"]])
def test_wrappers_are_looked_through(include):
    plain = select(Net(), include=include)
    model = Net()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1].attn = torch.compile(model.blocks[1].attn, backend="eager")
    model.head = torch.compile(model.head, backend="eager")  # the target itself is wrapped
    wrapped = select(torch.compile(model, backend="eager"), include=include)
    assert list(wrapped.matched) == list(plain.matched)
    assert all(type(module) is nn.Linear for module in wrapped.matched.values())
    assert wrapped.skipped == plain.skipped
    assert wrapped.aliases == {}
    assert list(modules_by_name(model)) == list(modules_by_name(Net()))


def test_a_glob_copied_from_a_wrapped_name_works():
    selection = select(Net(), include=["_orig_mod.blocks.0._checkpoint_wrapped_module.attn"])
    assert list(selection.matched) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_bare_string_is_refused_with_the_list_to_write(argument):
    with pytest.raises(TypeError, match=rf"{argument}='head'.*write a list: {argument}=\['head'\]"):
        select(Net(), **{argument: "head"})


@pytest.mark.parametrize("bad", [[1], [""], [None]])
def test_globs_must_be_non_empty_strings(bad):
    with pytest.raises(TypeError, match="non-empty strings"):
        select(Net(), include=bad)


def test_error_no_module_of_the_types_lists_what_there_is():
    with pytest.raises(NoMatchError) as caught:
        select(Net(), types=(nn.Conv1d, nn.Conv2d))
    message = str(caught.value)
    assert message.startswith("sigma_reparam: the model has no module of type Conv1d or Conv2d.")
    assert "7 Linear" in message
    assert "2 LayerNorm" in message
    assert "1 Embedding" in message


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("blocs", "'blocks'"),
        ("blocks.0.atn", "'blocks.0.attn'"),
        ("*.atn", "'blocks.0.attn'"),
        ("*.attn.qvk", "'blocks.0.attn.qkv'"),
        ("Head", "'head'"),
    ],
)
def test_error_globs_that_match_no_name_list_near_misses(glob, near):
    with pytest.raises(NoMatchError) as caught:
        select(Net(), include=[glob])
    message = str(caught.value)
    assert f"{glob!r} matches no module name (did you mean" in message
    assert near in message
    assert "Linear modules of this model: 'blocks.0.attn.qkv'" in message


def test_error_without_near_misses_still_lists_targets():
    said = r"'zzzzzzzz' matches no module name; there are 'embed', 'blocks', 'head'\. Linear modules of this model"
    with pytest.raises(NoMatchError, match=said):
        select(Net(), include=["zzzzzzzz"])


def test_error_globs_that_match_other_types_only():
    with pytest.raises(NoMatchError) as caught:
        select(Net(), include=["*.norm", "embed"])
    message = str(caught.value)
    assert "'*.norm' covers no Linear module, only 2 LayerNorm" in message
    assert "'embed' covers no Linear module, only 1 Embedding" in message


def test_error_all_excluded_names_the_pattern():
    with pytest.raises(NoMatchError) as caught:
        select(Net(), include=["head", "*.fc"], exclude=["blocks.*", "h*"])
    message = str(caught.value)
    assert "all 3 Linear modules that `include` covers are excluded by `exclude` glob 'blocks.*', 'h*'" in message


def test_error_empty_include():
    with pytest.raises(NoMatchError, match=r"include=\[\] covers nothing; write None"):
        select(Net(), include=[])


def test_an_empty_exclude_is_none():
    assert list(select(Net(), exclude=[]).matched) == LINEARS


def test_no_match_is_a_value_error():
    assert issubclass(NoMatchError, ValueError)


def test_a_glob_of_other_types_beside_one_with_an_effect_is_one_warning_at_the_caller():
    with pytest.warns(
        UserWarning, match=r"`include` glob 'embed' covers no Linear module, only 1 Embedding\."
    ) as caught:
        select(Net(), include=["head", "embed"])
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_excluding_modules_of_other_types_is_no_mistake():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(select(Net(), exclude=["*.norm", "embed"]).matched) == LINEARS


def test_near_names_exist_and_come_without_the_root():
    names = list(modules_by_name(Net()))
    near = near_names("*.norn", names)
    assert near[0] == "blocks.0.norm"
    assert set(near) <= set(names) - {""}
