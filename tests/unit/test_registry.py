"""The table of methods: its order and conflicts, and how it takes in one more."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
from torch import nn

from lightning_efficient import (
    Change,
    CollapseMonitor,
    RecipeError,
    SigmaReparam,
    SimplifiedLinearAttention,
    register_method,
)
from lightning_efficient.common.registry import METHODS, Method, Registry
from lightning_efficient.lifecycle.base import EfficientCallback
from lightning_efficient.lifecycle.checkpoint import replay_of
from lightning_efficient.lifecycle.methods import callback_class
from lightning_efficient.lifecycle.recipe import Entry

CONFLICTS = [(name, other) for name, method in METHODS.items() for other in method.excludes]


class Clipped(EfficientCallback):
    method = "clipped"


@pytest.fixture(autouse=True)
def forgotten():
    with METHODS.preserved():
        yield


# -- what is in it


@pytest.mark.parametrize(("one", "other"), CONFLICTS)
def test_conflicts_are_refused_in_either_order_and_say_what_to_do(one, other):
    message = METHODS[one].excludes[other]
    assert any(verb in message for verb in ("drop", "instead", "first", "use "))
    for names in permutations((one, other)):
        with pytest.raises(ValueError, match="cannot be used together") as caught:
            METHODS.check(["norm_swap", *names])
        assert message in str(caught.value)


def test_two_that_decide_what_goes_exclude_each_other():
    pruning = {name for name, method in METHODS.items() if method.prunes}
    masks = {"magnitude_pruning", "sap_pruning"}
    units = pruning - masks
    expected = {frozenset({u, m}) for u in units for m in masks} | {frozenset(units)}
    assert {frozenset(pair) for pair in CONFLICTS if set(pair) <= pruning} == expected


def test_the_rest_combines():
    METHODS.check([name for name in METHODS if name not in ("linear_attention", "hesso_pruning", "pagcp_pruning")])
    METHODS.check(["sigma_reparam", "sigma_reparam"])  # two instances, aimed at different modules
    METHODS.check([])


def test_unknown_names_are_refused_with_a_near_miss_and_a_way_out():
    with pytest.raises(ValueError, match=r"'sigma_repram' \(did you mean 'sigma_reparam'\?\).*register_method"):
        METHODS.check(["sigma_repram"])


def test_the_order_is_that_of_the_chain_from_raw_weight_to_used_weight():
    from lightning_efficient.weightspace import SpectralTransform
    from lightning_efficient.weightspace.mask import MaskTransform
    from lightning_efficient.weightspace.scale import ScaleTransform

    chain = ["sigma_reparam", "temp_scale", "magnitude_pruning"]
    assert sorted(chain, key=METHODS.position) == chain
    # Masks act on the raw weight, and so come first in the chain: they are put on last.
    assert MaskTransform.order < SpectralTransform.order < ScaleTransform.order


def test_records_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        METHODS["temp_scale"].excludes["sigma_reparam"] = "x"
    with pytest.raises(AttributeError):
        METHODS["temp_scale"].prunes = True
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["temp_scale"]


# -- taking one in


@pytest.mark.parametrize(
    ("place", "behind"),
    [({}, "run_cost"), ({"after": "temp_scale"}, "temp_scale"), ({"before": "norm_swap"}, "remove_norms"),
     ({"after": "sigma_reparam", "before": "slim"}, "sigma_reparam")],
)  # fmt: skip
def test_a_place_in_the_order(place, behind):
    register_method("clipped", Clipped, **place)
    names = list(METHODS)
    assert names[names.index("clipped") - 1] == behind
    assert METHODS["clipped"].callback is Clipped


def test_followers_of_one_method_stand_in_order_of_registration():
    METHODS.add(Method("one", after="slim"))
    METHODS.add(Method("two", after="slim"))
    METHODS.add(Method("inner", after="one"))
    assert list(METHODS)[METHODS.position("slim") :][:4] == ["slim", "one", "inner", "two"]


def test_the_same_again_changes_nothing_and_another_is_refused():
    register_method("clipped", Clipped, after="temp_scale", excludes={"sap_pruning": "use one"})
    before = list(METHODS)
    again = type("Clipped", (EfficientCallback,), dict(vars(Clipped)))  # as a notebook's cell that runs again
    register_method("clipped", again, after="temp_scale", excludes={"sap_pruning": "use one"})
    assert list(METHODS) == before
    assert METHODS["clipped"].callback is again
    with pytest.raises(ValueError, match="'clipped' is registered already"):
        register_method("clipped", Clipped)
    with pytest.raises(ValueError, match="'sigma_reparam' is registered already"):
        register_method("sigma_reparam", SigmaReparam, before="norm_swap")


def test_conflicts_work_from_both_sides():
    register_method("clipped", Clipped, excludes={"temp_scale": "use one of them"})
    for names in permutations(("clipped", "temp_scale")):
        with pytest.raises(ValueError, match="cannot be used together: use one of them"):
            METHODS.check(names)


class NoSwitch(EfficientCallback):
    method = "clipped"

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("name", "callback", "more", "said"),
    [
        ("not a name", Clipped, {}, "'not a name'.*identifier"),
        ("lambda", Clipped, {}, "'lambda'.*identifier"),
        ("trainer", Clipped, {}, "'trainer'.*other than.*trainer"),
        ("clipped", dict, {}, "dict.*subclass of EfficientCallback"),
        ("clip", Clipped, {}, "registered as 'clip', and its `method` is 'clipped'"),
        ("clipped", NoSwitch, {}, "NoSwitch has no argument `enabled`"),
        ("clipped", "clipped.Clipped", {}, r"`callback`.*'clipped\.Clipped'.*package\.module:name"),
        ("clipped", Clipped, {"replay": "somewhere"}, r"`replay`.*'somewhere'.*package\.module:name"),
        ("clipped", Clipped, {"config": "somewhere"}, r"`config`.*'somewhere'.*package\.module:name"),
        ("clipped", Clipped, {"config": dict}, "`config`.*dict.*expected a dataclass"),
        ("clipped", Clipped, {"after": "temp_scal"}, r"`after`.*'temp_scal' \(did you mean 'temp_scale'"),
        ("clipped", Clipped, {"before": "nobody"}, "`before`.*'nobody'.*expected one of .*remove_norms"),
        ("clipped", Clipped, {"excludes": {"sap": "x"}}, "`excludes`.*'sap'"),
        ("clipped", Clipped, {"after": "slim", "before": "norm_swap"}, "cannot stand after 'slim' and before"),
        ("clipped", Clipped, {"charts": {"loss": "("}}, r"`charts\['loss'\]`.*regular expression"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_the_table_alone(name, callback, more, said):
    before = list(METHODS.items())
    with pytest.raises(ValueError, match=f"(?s){said}"):
        register_method(name, callback, **more)
    assert list(METHODS.items()) == before


def test_a_callback_that_replaces_modules_says_how_to_do_it_again():
    class Swaps(SimplifiedLinearAttention):
        method = "swaps"

    with pytest.raises(ValueError, match="Swaps replaces modules, so 'swaps' needs `replay`"):
        register_method("swaps", Swaps)


@dataclass
class Bound:
    low: float
    high: float = 1.0


@pytest.mark.parametrize("config", [Bound, f"{__name__}:Bound"])
def test_a_file_has_to_give_what_replay_reads_of_its_config(config):
    register_method("clipped", Clipped, replay=lambda model, config, names: Change("clipped"), config=config)
    model = nn.Sequential(nn.Linear(2, 2))
    for given, said in (({"low": 0.0, "high": 1.0}, None), ({"low": 0.0}, "`config`: 'high' is missing")):
        replay = replay_of(Entry("clipped", "key", given, {"0": {}}))
        assert replay is not None
        with nullcontext() if said is None else pytest.raises(RecipeError, match=f"clipped in the.*{said}"):
            replay(model, ())


@pytest.mark.parametrize(("place", "said"), [("nowhere:Clipped", "nowhere"), (f"{__name__}:Cliped", "Cliped")])
def test_a_callback_by_its_place_is_looked_up_when_it_is_used(place, said):
    register_method("clipped", place)
    with pytest.raises(ValueError, match=rf"(?s)`callback` of the method clipped.*{said}"):
        callback_class("clipped")


def test_a_callback_by_its_place():
    register_method("clipped", f"{__name__}:Clipped")
    assert callback_class("clipped") is Clipped
    register_method("other", f"{CollapseMonitor.__module__}:CollapseMonitor")
    with pytest.raises(ValueError, match="registered as 'other'"):
        callback_class("other")


def test_what_is_registered_inside_is_forgotten():
    with METHODS.preserved():
        register_method("clipped", Clipped)
        assert "clipped" in METHODS
    assert "clipped" not in METHODS


# -- installed packages


def installed(folder: Path, module: str, code: str) -> None:
    """A package as pip leaves it."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[efficient.tests]\n{module} = {module}\n", encoding="utf-8")


def test_entry_points_register_when_a_name_is_looked_up(tmp_path, monkeypatch):
    registry = Registry([Method("first")], "efficient.tests")
    code = "from lightning_efficient.common.registry import METHODS, Method\nMETHODS.add(Method('installed_one'))\n"
    installed(tmp_path, "some_installed_methods", code)
    installed(tmp_path, "a_broken_package", "import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match=r"'a_broken_package'.*does not load.*a_module_that_is_not_there"):
        assert "installed_one" not in registry
    assert "installed_one" in METHODS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(registry) == ["first"]  # asked once
