from __future__ import annotations

import math

import pytest
import torch

from lightning_efficient.metrics.heatmap import _COLOURS, _Grid, _shorten, heatmap

RED, GREY = [255, 60, 60], [208, 208, 208]


def draw(values, labels, **options):
    return heatmap(values, labels, **({"title": "t", "unit": "nats", "low": 0.0, "high": 4.0} | options))


def pixel(image: torch.Tensor, names, columns, row, column, dx=3, dy=3) -> list[int]:
    """Near the upper left corner of a cell, where no text is."""
    x, y, _, _ = _Grid.fit(names, columns).box(row, column)
    return image[:, y + dy, x + dx].tolist()


def test_cells_have_the_colour_of_their_value_and_marks():
    values = [[0.0, 4.0, 4 / 9], [math.nan, 9.0, 2.0]]
    names = ["a", "b"]
    image = draw(values, names, frames=[[True, False, False]] * 2, dots=[[False, False, True]] * 2)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    low, high = _COLOURS[0].tolist(), _COLOURS[-1].tolist()
    assert pixel(image, names, 3, 0, 0) == low
    assert pixel(image, names, 3, 0, 1) == high
    assert pixel(image, names, 3, 0, 2) == _COLOURS[1].tolist()
    assert pixel(image, names, 3, 1, 0) == GREY
    assert pixel(image, names, 3, 1, 1) == high  # above the range
    assert pixel(image, names, 3, 0, 0, 0, 0) == RED
    assert pixel(image, names, 3, 0, 1, 0, 0) == high
    width = _Grid.fit(names, 3).width
    assert pixel(image, names, 3, 0, 2, width - 6, 5) == [255, 255, 255]


def test_the_colour_bar_runs_from_low_to_high():
    image = draw([[1.0] * 4] * 6, list("abcdef"))
    grid = _Grid.fit(list("abcdef"), 4)
    bar = image[:, grid.top : grid.foot, grid.right + 30].float()
    assert bar[:, 0].tolist() == _COLOURS[-1].tolist()
    assert bar[:, -1].tolist() == _COLOURS[0].tolist()
    assert (bar[1].diff() <= 0).all()  # green falls all the way down in viridis


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 64), (100, 2), (2, 700)])
def test_any_size_is_drawn_within_the_picture(layers, heads):
    names = [f"blocks.{i}" for i in range(layers)]
    image = draw([[0.5] * heads for _ in names], names)
    box = _Grid.fit(_shorten(names)[1], heads).box(layers - 1, heads - 1)
    assert image.shape[2] > box[2] + 80
    assert image.shape[1] > box[3] + 40


def test_rows_may_differ_in_length():
    image = draw([[1.0], [1.0, 2.0, 3.0]], ["a", "b"])
    assert pixel(image, ["a", "b"], 3, 0, 2) == [255, 255, 255]


@pytest.mark.parametrize(
    ("labels", "shared", "short"),
    [
        (["m.blocks.0.attn", "m.blocks.1.attn"], "m.blocks.*.attn", ["0", "1"]),
        (["m.0", "m.1", "m.1#2"], "m.*", ["0", "1", "1#2"]),
        (["enc.0.self", "dec.0.self", "dec.0.cross"], "", None),
        (["m.a", "m.a.b"], "m.*", ["a", "a.b"]),
        (["only.one"], "", None),
    ],
)
def test_shared_parts_of_names_are_shown_once(labels, shared, short):
    assert _shorten(labels) == (shared, short or labels)


def test_errors():
    with pytest.raises(ValueError, match="2 rows and 1 labels"):
        draw([[1.0], [2.0]], ["a"])
    with pytest.raises(ValueError, match="0 rows"):
        draw([], [])
