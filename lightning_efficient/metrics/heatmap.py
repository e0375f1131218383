"""A labelled heatmap as an image tensor, drawn with Pillow: matplotlib takes ten times as long."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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
) -> Tensor:
    """Draw a layer x head table of numbers.

    Args:
        values: One row per layer, one number per head; rows may differ in length. NaN cells are grey.
        labels: Name of each row; a prefix or suffix that all rows share is shown once.
        title: First line of the image.
        unit: Written over the colour bar.
        low: Value of the darkest colour.
        high: Value of the brightest colour; at least ``low``.
        frames: Cells to frame in red, shaped like ``values``.
        dots: Cells to put a dot into, shaped like ``values``.
        legend: Last line of the image.

    Returns:
        ``(3, height, width)`` uint8, for ``SummaryWriter.add_image``.

    Raises:
        ValueError: No rows, or not one label per row.
    """
    if not values or len(values) != len(labels):
        raise ValueError(f"got {len(values)} rows and {len(labels)} labels; expected as many, at least one.")
    columns = max(1, *(len(row) for row in values))
    cell = (max(10, min(44, 700 // columns)), max(12, min(26, 900 // len(values))))
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    shared, short = _shorten(labels)
    left, top = max(int(font.getlength(text)) for text in [*short, "layer"]) + 2 * _PAD, 64
    right, bottom = left + cell[0] * columns, top + cell[1] * len(values)
    subtitle = f"layers: {shared}" if shared else ""
    wide = max(int(font.getlength(text)) for text in (title, legend, subtitle)) + 2 * _PAD
    size = (max(right + 110, wide), max(bottom, top + 90) + 64)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((_PAD, 8), title, "black", font)
    draw.text((_PAD, 27), subtitle, (90, 90, 90), small)
    draw.text((left - _PAD, top - 4), "layer", "black", font, anchor="rd")
    draw.text((left + (right - left) / 2, bottom + 32), "head", "black", font, anchor="mm")
    for column in range(0, columns, max(1, math.ceil(22 / cell[0]))):
        draw.text((left + (column + 0.5) * cell[0], bottom + 12), str(column), "black", font, anchor="mm")
    for i, row in enumerate(values):
        y = top + i * cell[1]
        draw.text((left - _PAD, y + cell[1] / 2), short[i], "black", font, anchor="rm")
        for j, value in enumerate(row):
            box = (left + j * cell[0], y, left + (j + 1) * cell[0] - 1, y + cell[1] - 1)
            _cell(draw, box, value, low, high, small)
            if frames is not None and frames[i][j]:
                draw.rectangle(box, outline=_FRAME, width=2)
            if dots is not None and dots[i][j]:
                corner = (box[2] - 7, box[1] + 3, box[2] - 3, box[1] + 7)
                draw.ellipse(corner, _contrast(_colour(value, low, high)))
    _colour_bar(image, draw, right + 24, top, max(bottom, top + 90), low, high, unit, font)
    draw.text((_PAD, size[1] - 12), legend, "black", small, anchor="ls")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(size[1], size[0], 3).permute(2, 0, 1).contiguous()


def _cell(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    value: float,
    low: float,
    high: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    colour = _colour(value, low, high)
    draw.rectangle(box, colour)
    text = "n/a" if math.isnan(value) else f"{value:.2f}"
    if font.getlength(text) + 6 < box[2] - box[0] and box[3] - box[1] >= 14:
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


def _colour_bar(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    x: int,
    top: int,
    bottom: int,
    low: float,
    high: float,
    unit: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    for y in range(top, bottom):
        share = (bottom - 1 - y) / max(1, bottom - 1 - top)
        draw.line((x, y, x + 15, y), _colour(low + share * (high - low), low, high))
    for step in range(5):
        y = bottom - 1 - step * (bottom - 1 - top) / 4
        draw.line((x + 16, y, x + 20, y), "black")
        draw.text((x + 24, y), f"{low + step * (high - low) / 4:.2f}", "black", font, anchor="lm")
    draw.text((x, top - 10), unit, "black", font, anchor="ls")


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
