"""Data from a file: one error for all that can be wrong with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_efficient.common.schema import (
    Flag,
    Int,
    ListOf,
    MapOf,
    Number,
    OneOf,
    OrNone,
    Plain,
    Record,
    Schema,
    SchemaError,
    Such,
    TensorOf,
    Text,
    TupleOf,
    check,
)

RISING = Such(ListOf(Int(low=0)), lambda v: list(v) == sorted(v), "in rising order")
STATE = Record(
    {
        "step": Int(low=0),
        "share": Number(low=0, high=1),
        "tau": Number(above=0),
        "best": Number(finite=False),
        "on": Flag(),
        "unit": OneOf(("groups", "macs", None)),
        "plan": OrNone(TupleOf((Int(low=0), Int(low=1)))),
        "moments": RISING,
        "masks": MapOf(Text(), MapOf(Int(0, 7), TensorOf(torch.bool, ndim=1))),
        "score": TensorOf("floating", finite=True, low=0),
        "counts": TensorOf("integer", shape=(2,)),
    },
    optional={"config": Plain(), "optimizer": Plain(tensors=True)},
)


def good() -> dict[str, Any]:
    return {
        "step": 3, "share": 1, "tau": 0.5, "best": -math.inf, "on": False, "unit": None, "plan": [0, 1],
        "moments": (1, 2, 2), "masks": {"a.weight": {0: torch.tensor([True, False])}}, "score": torch.ones(2, 3),
        "counts": torch.tensor([1, 2]), "config": {"a": [1, None, {"b": "c"}]},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
    }  # fmt: skip


def test_good_data_passes_as_it_is():
    check(good(), STATE, "the state")
    check(good() | {"plan": None, "unit": "macs"}, STATE, "the state")


OTHERS = {
    "step": [True, 1.0, -1, "3", None, 2**63, 10**5000, math.nan, [3]],
    "share": [True, 1.01, -0.01, math.nan, math.inf, "0.5", None, 10**400, torch.tensor(0.5)],
    "tau": [0, -1.0, math.nan, math.inf, None],
    "best": [None, True, "inf", 10**400],
    "on": [0, 1, None, "true", torch.tensor(True)],
    "unit": ["Groups", 0, [], torch.ones(2), math.nan],
    "plan": [[], [0], [0, 1, 2], [0, 0], [0.0, 1], "01", {0: 0, 1: 1}],
    "moments": [[2, 1], [-1], 3, None, {"a": 1}, torch.tensor([1, 2])],
    "masks": [[], {1: {}}, {"a": None}, {"a": {8: torch.ones(1).bool()}}, {"a": {0: torch.ones(1)}},
              {"a": {0: torch.ones(1, 1).bool()}}, {"x" * 5000: {}}],
    "score": [torch.ones(2).long(), torch.tensor([math.nan]), torch.tensor([-1.0]), torch.ones(2).to_sparse(),
              torch.empty(2, device="meta"), torch.nn.Parameter(torch.ones(2)), [1.0], torch.ones(2).cfloat()],
    "counts": [torch.ones(2), torch.ones(2).bool(), torch.ones(3).long(), torch.tensor(1)],
    "config": [object(), {1: 2}, {"a": torch.ones(1)}, "x" * 5000, [[[[[[[[[[1]]]]]]]]]], {"a": {1, 2}}],
    "optimizer": [object(), {1.5: 2}, {(1,): 2}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "at"), [(name, i) for name, values in OTHERS.items() for i in range(len(values))])
def test_one_wrong_field_is_named(name: str, at: int):
    with pytest.raises(SchemaError, match=rf"the state, field \['{name}'\]") as caught:
        check(good() | {name: OTHERS[name][at]}, STATE, "the state")
    assert "should be" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", [name for name in good() if name not in ("config", "optimizer")])
def test_a_missing_field_is_named(name: str):
    state = good()
    del state[name]
    with pytest.raises(SchemaError, match=rf"\['{name}'\], should be there"):
        check(state, STATE, "the state")


def test_the_message_says_where_what_and_what_instead():
    with pytest.raises(
        OtherError, match=r"^the state of X, field \['plan'\]\[1\], should be a whole number from 1; got 0\.$"
    ):
        check(good() | {"plan": (3, 0)}, STATE, "the state of X", OtherError)
    with pytest.raises(SchemaError, match=r"\(a key\), should be a known field: .*'step'.*; got 'stpe'\."):
        check(good() | {"stpe": 1}, STATE, "the state")
    with pytest.raises(SchemaError, match=r"^the state should be a mapping with 'step'.*; got None"):
        check(None, STATE, "the state")
    with pytest.raises(SchemaError, match=r"null or a list of 2 .*; got a list of 3 "):
        check(good() | {"plan": [1, 2, 3]}, STATE, "the state")


class OtherError(ValueError):
    pass


TENSORS = st.sampled_from(
    [torch.ones(2), torch.ones(()).long(), torch.tensor([True]), torch.tensor([math.nan, 1]), torch.ones(2, 0)]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3) | TENSORS
KEYS = st.text(max_size=3) | st.integers() | st.none() | st.floats() | st.sampled_from([*good(), "a"])
DATA = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=DATA, name=st.sampled_from([*good()]))
def test_whatever_the_data_there_is_one_error(value: Any, name: str):
    for data, schema in ((value, STATE), (good() | {name: value}, STATE), (value, STATE.fields.get(name, Plain()))):
        refused = _refused(data, schema)
        assert refused is None or (refused.startswith("it") and len(refused) < 1200)


def _refused(data: Any, schema: Schema) -> str | None:
    try:
        check(data, schema, "it")
    except SchemaError as error:
        return str(error)
    return None
