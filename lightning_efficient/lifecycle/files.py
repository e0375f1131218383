"""The one place that reads a checkpoint, from wherever Lightning's own loader reads one; errors say why not."""

from __future__ import annotations

import difflib
import warnings
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_efficient.common.schema import Anything, MapOf, Part, Text, short

File = str | Path | IO[bytes]

# What Lightning's own loader needs, among much else.
_CHECKPOINT = Part(
    {"state_dict": MapOf(Text(), Anything()), "pytorch-lightning_version": Text()},
    optional={"hyper_parameters": MapOf(Anything(), Anything())},
)
_TRUST = (
    "Only a file that you trust may run code: pass weights_only=False then (`--trust` of "
    "`lightning-efficient export`), or allow the classes with torch.serialization.add_safe_globals"
)


# Of a folder that ModelParallelStrategy writes: names in its index, and the file with everything but tensors.
_STATE, _REST = "state_dict.", "meta.pt"


class CheckpointError(ValueError):
    """A file is not a whole checkpoint of a LightningModule; the message says what it is, and what to do."""


class UnsafeCheckpointError(CheckpointError):
    """A file holds objects that are no plain data, and was not to be trusted."""


class ShardedCheckpointError(CheckpointError):
    """A folder of shards that another strategy wrote, or a part of one."""


def check_checkpoint(path: str, weights_only: bool | None = None) -> None:
    """Refuse what a Trainer is about to load if it is no whole checkpoint; tensors of a local file are not read.

    Args:
        path: As for :func:`read_checkpoint`; of a URL, only whether it is there is checked.
        weights_only: As it will be loaded; None: as Lightning's Trainer does, which trusts the file.

    Raises:
        FileNotFoundError: See :func:`read_checkpoint`.
        CheckpointError: See :func:`read_checkpoint`.
        OSError: See :func:`read_checkpoint`.
    """
    if "://" in path:
        if not path.startswith(("http://", "https://")):
            _found(path)
        return
    try:
        read_checkpoint(path, mmap=True)
    except UnsafeCheckpointError:
        if weights_only:
            raise


def read_checkpoint(path: File, weights_only: bool | None = None, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: What ``LightningModule.load_from_checkpoint`` takes: a local path, a URL that fsspec knows (``file://``,
            ``memory://``, ``s3://``), ``http(s)://``, or an open binary file, which is left where it was. Or a local
            folder that ``ModelParallelStrategy`` wrote, of which the optimizers' states are left out.
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
    system = _found(path)
    if system.isdir(path):
        return _read_shards(path, safe)
    if mmap and Path(path).is_file() and zipfile.is_zipfile(path):
        return _load(path, path, safe, mmap=True)
    with system.open(path, "rb") as file:
        return _load(file, path, safe)


def _found(path: str) -> Any:
    """The file system of a file that is there."""
    try:
        system = get_filesystem(path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise CheckpointError(f"cannot read {path!r}: {error}.") from error
    if system.isdir(path):
        _check_folder(path, _names(system, path))
    if not system.exists(path):
        folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
        if not system.isdir(folder):
            raise FileNotFoundError(f"no checkpoint {path!r}: there is no folder {folder!r}.")
        close = difflib.get_close_matches(path.rpartition("/")[2], _names(system, folder), 3, 0.5)
        raise FileNotFoundError(f"no checkpoint {path!r}{f' (did you mean {close} there?)' if close else ''}.")
    return system


def _read_shards(path: str, safe: bool) -> dict[str, Any]:
    """A folder that ModelParallelStrategy has written, without the optimizers' states."""
    if safe:
        raise UnsafeCheckpointError(f"{path!r} is a folder of shards, whose index is pickled. {_TRUST}.")
    try:
        reader = FileSystemReader(path)
        state: dict[str, Any] = {}
        for name, part in reader.read_metadata().state_dict_metadata.items():
            if name.startswith(_STATE):
                tensor = isinstance(part, TensorStorageMetadata) and torch.empty(part.size, dtype=part.properties.dtype)
                state[name.removeprefix(_STATE)] = b"" if tensor is False else tensor
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it should be
            load_shards({_STATE[:-1]: state}, storage_reader=reader, no_dist=True)
        rest = torch.load(Path(path) / _REST, map_location="cpu", weights_only=safe)
    except OSError:
        raise
    except Exception as error:  # an index that is cut short or another one makes the reader raise anything
        raise CheckpointError(f"{path!r} is not a whole folder of shards: {short(str(error))}.") from error
    return _whole({**rest, "state_dict": state}, path)


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
            raise UnsafeCheckpointError(
                f"{name!r} holds objects that are no plain data: {', '.join(unsafe)}. {_TRUST}."
            ) from None
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        said = f"{name!r} is not a whole checkpoint: it is cut short, or a file of another kind ({why})."
        if safe and isinstance(error, UnpicklingError) and "Unsupported" in str(error):
            raise UnsafeCheckpointError(
                f"{said} Or it is whole, in the format of torch before 1.6, and holds objects that are no plain data. "
                f"{_TRUST}."
            ) from error
        raise CheckpointError(said) from error
    return _whole(content, name)


def _unsafe(file: str | IO[bytes]) -> list[str]:
    """The classes in a file that ``weights_only=True`` refuses."""
    if not isinstance(file, str):
        file.seek(0)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # no file of torch's, or one cut short
        return []


def _whole(content: Any, name: str) -> dict[str, Any]:
    if (wrong := _CHECKPOINT.wrong(content)) is None:
        return dict(content)
    found = short(content)
    if isinstance(content, nn.Module):
        found = f"a whole {type(content).__name__}: pickled, or TorchScript"
    elif isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        found = "a bare state dict: give it to the model's own load_state_dict"
    elif isinstance(content, Mapping):
        found = f"a mapping in which {wrong.path} should be {wrong.expected}, and is {short(wrong.value)}"
    raise CheckpointError(f"{name!r} is not a whole checkpoint that a Trainer wrote: it holds {found}.")


def _check_folder(path: str, names: list[str]) -> None:
    """Refuse a folder that holds no shards of ModelParallelStrategy."""
    said = f"{path!r} is not a whole checkpoint: it is "
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        if _REST in names:
            return
        raise ShardedCheckpointError(f"{said}a folder of shards, without the {_REST} of a Trainer.")
    if "zero_to_fp32.py" in names or "checkpoint" in names:
        raise ShardedCheckpointError(
            f"{said}a folder of DeepSpeed's shards. Make one file of it first, with lightning.pytorch.utilities."
            "deepspeed.convert_zero_checkpoint_to_fp32_state_dict(folder, file)."
        )
    files = [name for name in names if name.endswith((".ckpt", ".pt", ".pth"))]
    inside = f"with {files[:5]} in it: name one of these" if files else "without checkpoints"
    raise CheckpointError(f"{said}a folder, {inside}.")
