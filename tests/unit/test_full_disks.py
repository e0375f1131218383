"""A disk that is full, or a place where nothing can be written: one sentence that names the file; no half of a file."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_efficient import ModuleTimer, save_exported, save_pretrained, slim_report
from lightning_efficient.ablation.files import write_json
from lightning_efficient.ablation.plan import locked
from lightning_efficient.cli import main

ROOM = 2**20  # bytes that fit into a file


@pytest.fixture
def full() -> Iterator[None]:
    """Writes fail half way, also those of other libraries and of other languages than Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def bert() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=20_000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    model: nn.Module = hf.BertModel(config).eval()
    return model


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.safetensors", "model.pt2"])
def test_files_of_models(name: str, tmp_path: Path, full: None) -> None:
    with pytest.raises(OSError, match=rf"cannot write '.*{re.escape(name)}': .*[Tt]oo large"):
        save_exported(nn.Linear(600, 600).eval(), torch.zeros(2, 600), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_folders_of_models(tmp_path: Path, full: None) -> None:
    with pytest.raises(OSError, match=r"cannot write '.*hub': .*[Tt]oo large"):
        save_pretrained(bert(), tmp_path / "hub", {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    assert not list(tmp_path.iterdir())


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def timed(path: Path) -> None:
    trainer = Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path.parent, callbacks=[ModuleTimer(every_n_steps=2)],
    )  # fmt: skip
    trainer.fit(Small(), torch.utils.data.DataLoader(torch.randn(32, 4), 4))


def begun(path: Path) -> None:
    with locked(path.parent):
        pass


def drawn(path: Path) -> None:
    before, after = (nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2)) for width in (8, 4))
    slim_report(before, after, torch.zeros(1, 2), None).draw(path)


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "state of a run": ("status.json", lambda path: write_json(path, {"state": "running"})),
    "lock of an ablation": (".lock", begun),
    "picture of widths": ("widths.png", drawn),
    "times of modules": ("module_timer.json", timed),
}


@pytest.mark.parametrize("case", WRITERS)
def test_places_where_nothing_can_be_written(case: str, tmp_path: Path) -> None:
    name, write = WRITERS[case]
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run" / name
    said = rf"cannot write '{re.escape(str(path))}': Not a directory"
    if case == "times of modules":  # a script that has trained goes on
        with pytest.warns(UserWarning, match=said):
            write(path)
    else:
        with pytest.raises(OSError, match=said):
            write(path)


@pytest.mark.parametrize("out", ["/dev/full", "a closed pipe"])
def test_what_cannot_be_printed(out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if out == "/dev/full" and not Path(out).exists():
        pytest.skip("no /dev/full")
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe, Path(os.devnull if out != "/dev/full" else out).open("w") as file:
        monkeypatch.setattr(sys, "stdout", file if out == "/dev/full" else pipe)
        with pytest.raises(SystemExit) as end:
            main(["completion", "bash"])
        monkeypatch.undo()
    said = capsys.readouterr().err
    if out == "/dev/full":
        assert (end.value.code, said) == (2, "error: cannot write to the standard output: No space left on device.\n")
    else:
        assert (end.value.code, said) == (1, ""), "as other commands before `| head`"


def test_the_files_of_a_comparison_do_not_wait_for_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "metrics.csv").write_text("step,val_rate [/s]\n0,1\n1,2\n")
    files = [tmp_path / f"found.{kind}" for kind in ("html", "png", "json")]
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit, match="1"):
            main(["compare", str(logs), *(f"--{file.suffix[1:]}={file}" for file in files)])
        monkeypatch.undo()
    assert [file.name for file in files if not file.is_file()] == []


def test_an_error_is_said_though_nobody_reads_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit, match="2"):
            main(["compare", "nowhere"])
        monkeypatch.undo()
    assert capsys.readouterr().err.startswith("error: no such folder")


@pytest.mark.parametrize("args", [["--version"], ["ablate", "--help"], ["schema"]])
def test_a_full_disk_is_said_by_every_command(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with Path("/dev/full").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit, match="2"):
            main(args)
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: cannot write to the standard output: No space left on device.\n"
