"""The one place that reads a checkpoint, from wherever Lightning's own loader reads one; errors say why not."""

from __future__ import annotations

import difflib
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, NoReturn

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor, nn

from lightning_efficient.common.schema import short

File = str | Path | IO[bytes]

_TRUST = (
    "Only a file that you trust may run code: pass weights_only=False then (`--weights-only=false` on the command "
    "line), or allow the classes with torch.serialization.add_safe_globals"
)


class CheckpointError(ValueError):
    """A file is not a whole checkpoint of a LightningModule; the message says what it is, and what to do."""


def read_checkpoint(path: File, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: What ``LightningModule.load_from_checkpoint`` takes: a local path, a URL that fsspec knows (``file://``,
            ``memory://``, ``s3://``), ``http(s)://``, or an open binary file, which is left where it was.
        weights_only: As in ``torch.load``. None: True, which loads plain data and tensors and never runs code.
        mmap: Leave the tensors of a local file on disk until they are used. The file must not be written meanwhile.

    Raises:
        FileNotFoundError: There is no such file; names near misses.
        CheckpointError: It is something else than one whole checkpoint, or holds objects that ``weights_only`` refuses.
        OSError: It cannot be read.
    """
    safe = True if weights_only is None else weights_only
    if not isinstance(path, (str, PathLike)):
        start = path.tell()
        try:
            content = _load(path, str(getattr(path, "name", "the open file")), safe)
        finally:
            path.seek(start)
        return content
    if str(path).startswith(("http://", "https://")):
        content = torch.hub.load_state_dict_from_url(str(path), map_location="cpu", weights_only=safe)
        return _whole(content, str(path))
    return _read_path(str(path), safe, mmap)


def _read_path(path: str, safe: bool, mmap: bool) -> dict[str, Any]:
    try:
        system = get_filesystem(path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise CheckpointError(f"cannot read {path!r}: {error}.") from error
    if system.isdir(path):
        _refuse_folder(path, _names(system, path))
    if not system.exists(path):
        folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
        if not system.isdir(folder):
            raise FileNotFoundError(f"no checkpoint {path!r}: there is no folder {folder!r}.")
        close = difflib.get_close_matches(path.rpartition("/")[2], _names(system, folder), 3, 0.5)
        raise FileNotFoundError(f"no checkpoint {path!r}{f' (did you mean {close} there?)' if close else ''}.")
    if mmap and Path(path).is_file() and zipfile.is_zipfile(path):
        return _load(path, path, safe, mmap=True)
    with system.open(path, "rb") as file:
        return _load(file, path, safe)


def _names(system: Any, folder: str) -> list[str]:
    return sorted(str(name).rstrip("/").rpartition("/")[2] for name in system.ls(folder, detail=False))


def _load(file: str | IO[bytes], name: str, safe: bool, mmap: bool = False) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a TorchScript archive, which is refused below
            content = torch.load(file, map_location="cpu", weights_only=safe, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # a file that is cut short or of another kind makes the unpickler raise anything
        if unsafe := _unsafe(file) if safe else []:
            raise CheckpointError(
                f"{name!r} holds objects that are no plain data: {', '.join(unsafe)}. {_TRUST}."
            ) from None
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        trust = f" If it is an old file with objects that are no plain data: {_TRUST}." if _refused(error) else ""
        raise CheckpointError(
            f"{name!r} is not a whole checkpoint: it is cut short, or a file of another kind ({why}).{trust}"
        ) from error
    return _whole(content, name)


def _refused(error: Exception) -> bool:
    """Whether it may be a whole file, in the format of torch before 1.6, that is not safe."""
    return isinstance(error, UnpicklingError) and "Unsupported" in str(error)


def _unsafe(file: str | IO[bytes]) -> list[str]:
    """The classes in a file that ``weights_only=True`` refuses."""
    if not isinstance(file, str):
        file.seek(0)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # no file of torch's, or one cut short
        return []


def _whole(content: Any, name: str) -> dict[str, Any]:
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if isinstance(state, Mapping) and all(type(key) is str for key in (*content, *state)):
        return dict(content)
    found = short(content)
    if isinstance(content, nn.Module):
        found = f"a whole {type(content).__name__}: pickled, or TorchScript"
    elif isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        found = "a bare state dict: give it to the model's own load_state_dict"
    elif isinstance(content, Mapping) and "state_dict" in content:
        found = f"one whose 'state_dict' is {short(state)}"
    raise CheckpointError(
        f"{name!r} is not a whole checkpoint of a LightningModule, a mapping with a 'state_dict' in it: it holds "
        f"{found}."
    )


def _refuse_folder(path: str, names: list[str]) -> NoReturn:
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        why = (
            "is a sharded checkpoint. Make one file of it first: `python -m "
            f"lightning.pytorch.utilities.consolidate_checkpoint {path}` writes {path}.consolidated"
        )
    elif "zero_to_fp32.py" in names or "checkpoint" in names:
        why = (
            "is a checkpoint of DeepSpeed's shards. Make one file of it first, with "
            "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict(folder, file)"
        )
    else:
        files = [name for name in names if name.endswith((".ckpt", ".pt", ".pth"))]
        why = f"is a folder, with {files[:5]} in it: name one of these" if files else "is a folder, without checkpoints"
    raise CheckpointError(f"{path!r} is not a whole checkpoint: it {why}.")
