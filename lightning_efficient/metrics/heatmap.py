"""A labelled heatmap as an image tensor, drawn with Pillow: matplotlib takes ten times as long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_efficient.common.escaping import printable

# Ten evenly spaced colours of matplotlib's viridis: even in lightness, and readable by the colour-blind.
_COLOURS = torch.tensor(
    [
        [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
        [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37],
    ]
)  # fmt: skip
_NO_VALUE = (208, 208, 208)
_FRAME = (255, 60, 60)
_PAD = 12
_LINE = 24
_Box: TypeAlias = tuple[int, int, int, int]
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def heatmap(
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    title: str,
    unit: str,
    low: float,
    high: float,
    frames: Sequence[Sequence[bool]] | None = None,
    dots: Sequence[Sequence[bool]] | None = None,
    legend: str = "",
    axes: tuple[str, str] = ("layer", "head"),
) -> Tensor:
    """Draw a table of numbers, layer x head unless said otherwise.

    Args:
        values: One row per layer, one number per head; rows may differ in length. NaN cells are grey.
        labels: Name of each row; a prefix or suffix that all rows share is shown once.
        title: First line of the image.
        unit: Written over the colour bar.
        low: Value of the darkest colour.
        high: Value of the brightest colour; at least ``low``.
        frames: Cells to frame in red, shaped like ``values``.
        dots: Cells to put a dot into, shaped like ``values``.
        legend: Last lines of the image; three spaces end a line.
        axes: What a row is, and a column.

    Returns:
        ``(3, height, width)`` uint8, for ``SummaryWriter.add_image``.

    Raises:
        ValueError: No rows, or not one label per row.
    """
    if not values or len(values) != len(labels):
        raise ValueError(f"got {len(values)} rows and {len(labels)} labels; expected as many, at least one.")
    shared, names = _shorten([printable(label) for label in labels])
    shared, names = printable(shared, 90), [printable(name, 40) for name in names]
    title, unit, legend = (printable(text, 120) for text in (title, unit, legend))
    grid = _Grid.fit(names, max(1, *(len(row) for row in values)))
    subtitle = f"{axes[0]}s: {shared}" if shared else ""
    notes = [part.strip() for part in legend.split("   ") if part.strip()]
    wide = max(int(grid.font.getlength(text)) for text in (title, subtitle, *notes)) + 2 * _PAD
    image = Image.new("RGB", (max(grid.right + 110, wide), grid.foot + 72 + _LINE * len(notes)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_PAD, 8), title, "black", grid.font)
    draw.text((_PAD, 34), subtitle, (90, 90, 90), grid.small)
    for line, note in enumerate(notes):
        draw.text((_PAD, grid.foot + 66 + _LINE * (line + 0.5)), note, "black", grid.small, anchor="lm")
    _axes(draw, grid, names, axes)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            box = grid.box(i, j)
            _cell(draw, box, value, low, high, grid.small)
            if frames is not None and frames[i][j]:
                draw.rectangle(box, outline=_FRAME, width=2)
            if dots is not None and dots[i][j]:
                corner = (box[2] - 7, box[1] + 3, box[2] - 3, box[1] + 7)
                draw.ellipse(corner, _contrast(_colour(value, low, high)))
    _colour_bar(draw, grid, low, high, unit)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


class _Grid(NamedTuple):
    """Where the cells are, in pixels, and the two fonts."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int
    font: _Font
    small: _Font

    @classmethod
    def fit(cls, names: Sequence[str], columns: int) -> _Grid:
        # TensorBoard shows a picture of 700 pixels at half its size.
        font, small = ImageFont.load_default(20), ImageFont.load_default(18)
        width, height = max(10, min(46, 700 // columns)), max(14, min(30, 900 // len(names)))
        left, top = max(int(font.getlength(text)) for text in [*names, "layer"]) + 2 * _PAD, 86
        return cls(left, top, left + width * columns, top + height * len(names), width, height, font, small)

    @property
    def foot(self) -> int:
        """Lower end of the colour bar, which needs some height even beside a single row."""
        return max(self.bottom, self.top + 90)

    def box(self, row: int, column: int) -> _Box:
        x, y = self.left + column * self.width, self.top + row * self.height
        return x, y, x + self.width - 1, y + self.height - 1


def _axes(draw: ImageDraw.ImageDraw, grid: _Grid, names: Sequence[str], axes: tuple[str, str]) -> None:
    draw.text((grid.left - _PAD, grid.top - 4), axes[0], "black", grid.font, anchor="rd")
    draw.text(((grid.left + grid.right) / 2, grid.bottom + 42), axes[1], "black", grid.font, anchor="mm")
    for row, name in enumerate(names):
        y = grid.top + (row + 0.5) * grid.height
        font = grid.font if grid.height > 20 else ImageFont.load_default(max(10, grid.height - 3))
        draw.text((grid.left - _PAD, y), name, "black", font, anchor="rm")
    for column in range(0, (grid.right - grid.left) // grid.width, math.ceil(28 / grid.width)):
        x = grid.left + (column + 0.5) * grid.width
        draw.text((x, grid.bottom + 16), str(column), "black", grid.font, anchor="mm")


def _cell(draw: ImageDraw.ImageDraw, box: _Box, value: float, low: float, high: float, font: _Font) -> None:
    colour = _colour(value, low, high)
    draw.rectangle(box, colour)
    text = "n/a" if math.isnan(value) else f"{value:.2f}"
    if font.getlength(text) + 4 < box[2] - box[0] and box[3] - box[1] >= 20:
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, text, _contrast(colour), font, anchor="mm")


def _colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    if not math.isfinite(value):
        return _NO_VALUE
    share = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    place = share * (len(_COLOURS) - 1)
    below = min(int(place), len(_COLOURS) - 2)
    r, g, b = torch.lerp(_COLOURS[below].float(), _COLOURS[below + 1].float(), place - below).round().tolist()
    return int(r), int(g), int(b)


def _contrast(colour: tuple[int, int, int]) -> str:
    return "black" if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 128 else "white"


def _colour_bar(draw: ImageDraw.ImageDraw, grid: _Grid, low: float, high: float, unit: str) -> None:
    x, last, length = grid.right + 24, grid.foot - 1, grid.foot - 1 - grid.top
    for y in range(grid.top, grid.foot):
        draw.line((x, y, x + 15, y), _colour(low + (last - y) / length * (high - low), low, high))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = last - share * length
        draw.line((x + 16, at, x + 20, at), "black")
        draw.text((x + 24, at), f"{low + share * (high - low):.2f}", "black", grid.font, anchor="lm")
    draw.text((x, grid.top - 10), unit, "black", grid.font, anchor="ls")


def _shorten(labels: Sequence[str]) -> tuple[str, list[str]]:
    """What all dotted names share, with ``*`` for the rest, and the rest of each."""
    parts = [label.split(".") for label in labels]
    if len(labels) < 2:
        return "", list(labels)
    shortest = min(len(p) for p in parts)
    head = 0
    while head < shortest - 1 and len({p[head] for p in parts}) == 1:
        head += 1
    tail = 0
    while tail < shortest - 1 - head and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    if not head and not tail:
        return "", list(labels)
    pattern = [*parts[0][:head], "*", *(parts[0][-tail:] if tail else [])]
    return ".".join(pattern), [".".join(p[head : len(p) - tail]) for p in parts]
