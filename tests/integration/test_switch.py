"""``LIGHTNING_EFFICIENT=m.yaml python train.py`` changes an untouched script; without the variable nothing happens."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_efficient import CollapseMonitor, SigmaReparam
from lightning_efficient._switch import callbacks_from_environment
from lightning_efficient.common.names import VARIABLE

SCRIPT = """
import json, sys, warnings
import torch
import lightning.pytorch as pl

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.manual_seed(0)
data = torch.utils.data.DataLoader(torch.randn(16, 6), batch_size=4)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
net = Net()
trainer.fit(net, data)
json.dump({
    "callbacks": [type(cb).__name__ for cb in trainer.callbacks],
    "ours": sorted(m for m in sys.modules if m.startswith("lightning_efficient")),
    "weights": [p.sum().item() for p in net.parameters()],
}, open(sys.argv[1], "w"))
"""


# Runs the script twice, without and with the variable: importing torch and lightning takes seconds, once is enough.
DRIVER = """
import os, runpy, sys
for result, value in zip(sys.argv[2:4], ["", sys.argv[4]]):
    os.environ["LIGHTNING_EFFICIENT"], sys.argv[1:2] = value, [result]
    print("=== run", file=sys.stderr, flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_script_that_does_not_know_us(tmp_path: Path) -> None:
    script, methods = tmp_path / "train.py", tmp_path / "m.yaml"
    script.write_text(SCRIPT, encoding="utf-8")
    methods.write_text("sigma_reparam: {init: one}\n", encoding="utf-8")
    files = [tmp_path / "off.json", tmp_path / "on.json"]
    code = f"import sys; sys.argv[0] = {str(script)!r}\n{DRIVER}"
    command = [sys.executable, "-c", code, "result", *files, methods]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    off, on = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    _, said_off, said_on = done.stderr.split("=== run\n")
    assert off["callbacks"] == []
    assert off["ours"] == ["lightning_efficient"]
    assert "lightning_efficient" not in said_off
    assert on["callbacks"] == ["SigmaReparam"]
    assert on["weights"] != off["weights"]
    assert [line for line in said_on.splitlines() if line.startswith("lightning_efficient:")] == [
        f"lightning_efficient: {VARIABLE}={methods} adds SigmaReparam."
    ]


def test_importing_the_switch_imports_nothing_heavy() -> None:
    code = "import sys, lightning_efficient._switch as s; s.callbacks_from_environment(); print(*sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    third_party = {"torch", "lightning", "yaml", "jsonargparse", "numpy", "timm", "rich"}
    assert third_party.isdisjoint(done.stdout.split())


def test_an_unset_variable_costs_far_below_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (entry,) = entry_points(group="lightning.pytorch.callbacks_factory", name="lightning_efficient")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert entry.load()() == []
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 1e-3


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "m.yaml"
    file.write_text("sigma_reparam: {exclude: [head]}\ncollapse_monitor: false\n", encoding="utf-8")
    monkeypatch.setenv(VARIABLE, str(file))
    return file


def test_the_factory_builds_and_says_so_in_one_line(methods: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        sigma, monitor = callbacks_from_environment()
    assert isinstance(sigma, SigmaReparam)
    assert sigma.exclude == ["head"]
    assert isinstance(monitor, CollapseMonitor)
    assert not monitor.enabled
    assert caplog.messages == [
        f"lightning_efficient: {VARIABLE}={methods} adds SigmaReparam, CollapseMonitor (off)."
    ]  # fmt: skip


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks))


def test_a_trainer_that_has_the_method_already(methods: Path) -> None:
    assert sum(isinstance(cb, SigmaReparam) for cb in trainer(SigmaReparam(include=["blocks"])).callbacks) == 2
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SigmaReparam`"):
        trainer(SigmaReparam(exclude=["head"]))


def test_a_wrong_file_stops_the_trainer(methods: Path) -> None:
    methods.write_text("sigma_repram: true", encoding="utf-8")
    with pytest.raises(ValueError, match=r"m\.yaml: unknown method 'sigma_repram' \(did you mean 'sigma_reparam'\?\)"):
        trainer()
    methods.unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.yaml"):
        trainer()
