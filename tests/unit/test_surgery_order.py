"""Declared order and conflicts of methods."""

from itertools import permutations

import pytest

from lightning_efficient.common.registry import CONFLICTS, ORDER, STRUCTURED, check_methods, sort_methods


def test_every_conflict_names_two_known_methods_and_says_what_to_do():
    for pair, message in CONFLICTS.items():
        assert len(pair) == 2
        assert pair <= set(ORDER)
        assert any(verb in message for verb in ("drop", "instead", "first", "use "))


@pytest.mark.parametrize("pair", list(CONFLICTS), ids=lambda pair: " + ".join(sorted(pair)))
def test_conflicts_are_refused_in_either_order_with_the_message(pair):
    for names in permutations(pair):
        with pytest.raises(ValueError, match="cannot be used together") as caught:
            check_methods(["norm_swap", *names])
        assert CONFLICTS[pair] in str(caught.value)


def test_the_rest_combines():
    allowed = [name for name in ORDER if name not in ("linear_attention", "remove_norms", *STRUCTURED)]
    check_methods(allowed)
    check_methods(["sigma_reparam", "sigma_reparam"])  # two instances, aimed at different modules
    check_methods([])


def test_unknown_names_are_refused_with_a_near_miss():
    with pytest.raises(ValueError, match=r"Unknown method 'sigma_repram'.*Did you mean 'sigma_reparam'"):
        check_methods(["sigma_repram"])


def test_sorting_does_not_depend_on_the_order_given():
    names = ["magnitude_pruning", "sigma_reparam", "temp_scale", "norm_swap"]
    expected = ["norm_swap", "sigma_reparam", "temp_scale", "magnitude_pruning"]
    assert all(sort_methods(list(given)) == expected for given in permutations(names))
    twice = ["magnitude_pruning", "sigma_reparam", "magnitude_pruning"]
    assert sort_methods(twice) == ["sigma_reparam", "magnitude_pruning", "magnitude_pruning"]


def test_sorting_checks():
    with pytest.raises(ValueError, match="cannot be used together"):
        sort_methods(["temp_scale", "linear_attention"])


def test_the_data_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        CONFLICTS[frozenset({"a", "b"})] = "x"
