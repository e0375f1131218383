"""The files of a run's folder: plain JSON, each written whole or not at all."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from lightning_efficient.common.escaping import write_whole

INPUTS = "inputs.json"  # what the run was started with
STATUS = "status.json"  # how far it is: written by whoever runs the process
PROGRESS = "progress.json"  # epoch, step, metrics: written by the process itself
START = "start.json"  # digests of the initial weights and of each epoch's first batch
METHODS_FILE = "methods.yaml"
EXPORT = "export.json"  # why the trained model could not be exported
LOG = "log.txt"
CHECKPOINT = "resume.ckpt"
CSV = {"fit": "csv", "test": "csv_test"}  # folders of a CSVLogger, which empties the one that it is given


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty if there is no file.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete {path.parent} to train that run anew.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object: delete {path.parent} to train that run anew.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a reader, or a run killed here, never sees half of it.

    Raises:
        OSError: In one sentence, with the file and the reason.
    """
    write_whole(path, json.dumps(content, indent=1, default=str))


def last_checkpoint(folder: Path) -> Path | None:
    """The run's own resume point; else the newest whole checkpoint in the folder; else ``None``."""
    files = sorted(folder.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
    # A zip file's directory comes last, so that a file cut short by a kill is not one.
    whole = [file for file in files if file.is_dir() or zipfile.is_zipfile(file)]
    return next((file for file in whole if file == folder / CHECKPOINT), whole[0] if whole else None)
