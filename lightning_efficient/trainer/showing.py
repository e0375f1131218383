"""Pictures and texts of a run, where each of its loggers shows such things."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from torch import Tensor

from lightning_efficient.common.escaping import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

Picture: TypeAlias = Union["Figure", Tensor]


def shows_pictures(logger: Logger) -> bool:
    """Whether :func:`show_picture` has a way to it."""
    known = isinstance(logger, TensorBoardLogger | MLFlowLogger | CSVLogger)
    return known or callable(getattr(logger, "log_image", None))


def show_picture(loggers: Iterable[Logger], tag: str, draw: Callable[[], Picture], step: int) -> None:
    """Put a picture into TensorBoard, W&B, MLflow (an artifact) or, of a ``CSVLogger``, beside its file.

    Any other logger gets it by ``log_image``, if it has that of Lightning's ``WandbLogger``.

    Args:
        loggers: Of the run, on the process that writes.
        tag: Such as ``efficient/module_timer/icicle``.
        draw: Makes a figure of matplotlib, or a uint8 tensor of ``(3, height, width)``; only called if one shows it.
        step: Of the Trainer.
    """
    able = [logger for logger in loggers if shows_pictures(logger)]
    if not able:
        return
    picture, image = draw(), None
    for logger in able:
        if isinstance(logger, TensorBoardLogger):
            if isinstance(picture, Tensor):
                logger.experiment.add_image(tag, picture, step)
            else:
                logger.experiment.add_figure(tag, picture, step, close=False)
            continue
        image = image or _image(picture)
        if isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, image, f"{_file(tag, step)}.png")
        elif isinstance(logger, CSVLogger):
            write_whole(Path(logger.log_dir, f"{_file(tag, step)}.png"), _png(image))
        else:
            logger.log_image(tag, [image], step)  # type: ignore[attr-defined]


def show_text(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Likewise a report.

    Args:
        loggers: Of the run, on the process that writes.
        tag: Such as ``efficient/padding_report/advice``.
        text: As for a terminal: its lines stay, and its columns.
        step: Of the Trainer.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            # TensorBoard reads Markdown, in which an indented text is shown as it is.
            logger.experiment.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{_file(tag, step)}.txt")
        elif isinstance(logger, CSVLogger):
            write_whole(Path(logger.log_dir, f"{_file(tag, step)}.txt"), text)
        elif callable(log_text := getattr(logger, "log_text", None)):
            log_text(tag, columns=["text"], data=[[text]], step=step)


def _file(tag: str, step: int) -> str:
    """Sorted by step; below a folder of its own, since a name may be that of another tag's folder."""
    return f"shown/{tag}/step_{step:08d}"


def _image(picture: Picture) -> Image:
    from PIL import Image

    if isinstance(picture, Tensor):
        return Image.fromarray(picture.movedim(0, -1).contiguous().numpy())
    file = io.BytesIO()
    picture.savefig(file, format="png")
    return Image.open(file)


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()
