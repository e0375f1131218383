"""Reading a checkpoint: from everywhere Lightning reads one, and what is none is named."""

from __future__ import annotations

import argparse
import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from lightning_efficient import load_from_checkpoint
from lightning_efficient.lifecycle.files import CheckpointError, read_checkpoint
from lightning_efficient.lifecycle.recipe import KEY

EMPTY = {"state_dict": {}, "pytorch-lightning_version": pl.__version__}


class Lit(pl.LightningModule):
    def __init__(self, width: int = 4, note: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 2))


def saved(path: Path, **hyper_parameters: Any) -> Path:
    """What a Trainer writes, with the recipe of a method that changes modules."""
    cut = torch.tensor([True, False, True, True])
    widths = {"net.0": {"out_features": 3}, "net.2": {"in_features": 3}}
    tensors = {"net.0.weight": {"0": cut}, "net.0.bias": {"0": cut}, "net.2.weight": {"1": cut}}
    entry = {"method": "slim", "key": "cut", "config": {"attributes": widths, "units": {}}, "tensors": tensors}
    content = {
        "state_dict": Lit(3).state_dict(), "hyper_parameters": hyper_parameters, "hparams_name": "kwargs",
        "pytorch-lightning_version": pl.__version__, KEY: {"version": 1, "methods": [entry]},
    }  # fmt: skip
    torch.save(content, path)
    return path


def test_every_way_of_naming_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt")
    expected = torch.load(path, weights_only=True)["state_dict"]
    MemoryFileSystem().pipe("memory://runs/a.ckpt", path.read_bytes())
    with path.open("rb") as file:
        for source in (path, str(path), f"file://{path}", "memory://runs/a.ckpt", file, io.BytesIO(path.read_bytes())):
            got = load_from_checkpoint(Lit, source).state_dict()
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in got)
    with pytest.raises(FileNotFoundError, match=r"'memory://runs/b.ckpt' \(did you mean \['a.ckpt'\] there\?\)"):
        load_from_checkpoint(Lit, "memory://runs/b.ckpt")
    with pytest.raises(CheckpointError, match="Protocol not known: floppy"):
        load_from_checkpoint(Lit, "floppy://a.ckpt")


def test_a_file_that_may_run_code_needs_trust(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", note=argparse.Namespace(a=1))
    for choice in (None, True):
        with pytest.raises(CheckpointError, match=r"no plain data: argparse\.Namespace.*weights_only=False"):
            load_from_checkpoint(Lit, path, weights_only=choice)
    model = load_from_checkpoint(Lit, path, weights_only=False)
    assert model.hparams["note"] == argparse.Namespace(a=1)
    assert model.net[0].out_features == 3
    old = tmp_path / "old.ckpt"
    torch.save({**EMPTY, "x": argparse.Namespace()}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        read_checkpoint(old)
    assert read_checkpoint(old, weights_only=False)["x"] == argparse.Namespace()


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<a/>")


def _cut(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        whole = saved(path).read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return write


def _script(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


NONE_WHOLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cut short"),
    "a text": (lambda path: path.write_text("trainer: {max_epochs: 3}", encoding="utf-8"), "file of another kind"),
    "another zip": (_zip, "file of another kind"),
    "half": (_cut(0.5), "cut short"),
    "a little less": (_cut(0.98), "cut short"),
    "the first bytes": (_cut(0.01), "cut short"),
    "a state dict": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "a bare state dict"),
    "a list": (lambda path: torch.save([1, 2], path), r"it holds a list of 2 \(1, 2\)"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "it holds a tensor"),
    "an empty mapping": (lambda path: torch.save({}, path), r"\['state_dict'\] should be there"),
    "no state dict": (
        lambda path: torch.save(EMPTY | {"state_dict": [1]}, path),
        r"\['state_dict'\] .* is a list of 1",
    ),
    "timm's": (lambda path: torch.save({"state_dict": {}}, path), r"\['pytorch-lightning_version'\] should be there"),
    "no parameters": (lambda path: torch.save(EMPTY | {"hyper_parameters": None}, path), "and is None"),
    "a module": (lambda path: torch.save(nn.Linear(2, 2), path), "no plain data: torch.nn.modules.linear.Linear"),
    "a folder": (lambda path: path.mkdir(), "without checkpoints"),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", NONE_WHOLE)
def test_what_is_no_whole_checkpoint_is_named(name: str, mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    NONE_WHOLE[name][0](path)
    with pytest.raises(CheckpointError, match=NONE_WHOLE[name][1]) as caught:
        read_checkpoint(path, mmap=mmap)
    assert re.search(r"'.*x\.ckpt' (is not a whole checkpoint|holds objects)", str(caught.value))
    if not path.is_dir():
        with path.open("rb") as file, pytest.raises(CheckpointError, match=NONE_WHOLE[name][1]):
            read_checkpoint(file)
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            read_checkpoint(path, weights_only=False, mmap=mmap)


def test_folders_say_what_to_do(tmp_path: Path) -> None:
    for names, said in (
        ([".metadata", "__0_0.distcp", "meta.pt"], r"folder of shards, whose index is pickled.*weights_only=False"),
        ([".metadata", "__0_0.distcp"], "without the meta.pt"),
        (["checkpoint", "latest", "zero_to_fp32.py"], "convert_zero_checkpoint_to_fp32_state_dict"),
        (["last.ckpt", "best.ckpt", "log.txt"], r"with \['best.ckpt', 'last.ckpt'\] in it: name one"),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}.ckpt"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(CheckpointError, match=said):
            read_checkpoint(folder)


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "epoch=1-step=8.ckpt")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "epoch=2-step=8.ckpt", "epoch=1-step=9.ckpt"):
        with pytest.raises(FileNotFoundError, match=r"did you mean \['epoch=1-step=8.ckpt'\] there"):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*/runs'"):
        read_checkpoint(tmp_path / "runs" / "a.ckpt")


def test_mapped_content_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(EMPTY | {"state_dict": {"w": torch.arange(5.0)}}, path)
    assert read_checkpoint(path, mmap=True)["state_dict"]["w"].tolist() == [0, 1, 2, 3, 4]
