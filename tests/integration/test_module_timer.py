"""ModuleTimer: rows that add up, backward given to the module that made it, and a run that does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_efficient import ModuleTimer


class Slow(torch.autograd.Function):
    """Cheap forward, dear backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones(300, 300))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (m,) = ctx.saved_tensors
        for _ in range(10):
            m = m @ m / 300
        return grad + 0 * m[0, 0]


class Heavy(nn.Module):
    """Dear forward, cheap backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            m = torch.ones(300, 300)
            for _ in range(10):
                m = m @ m / 300
        return x * self.scale + 0 * m[0, 0]


class Backward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Slow.apply(x)  # type: ignore[no-any-return]


class Model(LightningModule):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"inside": nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Dropout(0.2))})
        self.heavy, self.backwards, self.unused = Heavy(), Backward(), nn.Linear(2, 2)
        self.again = again

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        inside = self.body["inside"]
        x = checkpoint(inside, batch, use_reentrant=False) if self.again else inside(batch)
        out: Tensor = self.backwards(self.heavy(x)).square().mean()
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(root: Path, model: LightningModule, *callbacks: Any, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    options: dict[str, Any] = {"max_steps": 6, "logger": False} | kwargs
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False, default_root_dir=root,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.randn(12, 16), 2))  # type: ignore[arg-type]
    return trainer


def test_forward_and_backward_go_to_their_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timer = ModuleTimer(every_n_steps=2)
    fit(tmp_path, Model(), timer, logger=[TensorBoardLogger(tmp_path, "tb", "")])
    rows = {row.name: row for row in timer.rows}
    assert set(rows) == {"body.inside", "body.inside.0", "body.inside.1", "body.inside.2", "heavy", "backwards"}
    heavy, backwards, inside = rows["heavy"], rows["backwards"], rows["body.inside"]
    assert heavy.forward_ms > 5 * heavy.backward_ms > 0
    assert backwards.backward_ms > 5 * backwards.forward_ms > 0
    parts = [rows[f"body.inside.{i}"] for i in range(3)]
    assert inside.forward_ms >= sum(part.forward_ms for part in parts)
    assert inside.backward_ms == pytest.approx(sum(part.backward_ms for part in parts))
    assert parts[0].backward_ms > 0
    assert all(row.calls == 1 for row in rows.values())
    assert parts[0].memory_mib == pytest.approx(2 * 16 * 4 / 2**20, rel=0.01)

    written = json.loads((tmp_path / "tb" / "module_timer.json").read_text())
    assert written["steps"] == 2
    assert {row["name"] for row in written["modules"]} == set(rows)
    log = EventAccumulator(str(tmp_path / "tb"))
    log.Reload()
    assert "efficient/module_timer/icicle" in log.Tags()["images"]
    (first, second) = log.Scalars("efficient/module_timer/backward_ms")
    assert (first.step, second.step) == (3, 5)
    assert second.value <= log.Scalars("efficient/module_timer/step_ms")[1].value
    assert "by what modules take themselves" in capsys.readouterr().out


@pytest.mark.parametrize("again", [False, True])
def test_the_run_does_not_notice(again: bool, tmp_path: Path) -> None:
    """In-place activations, dropout, activation checkpointing."""
    results = []
    timer = ModuleTimer(every_n_steps=1, table=False)
    for callbacks in ([timer], [ModuleTimer(enabled=False)], []):
        torch.manual_seed(3)
        model = Model(again)
        fit(tmp_path, model, *callbacks)
        results.append((model.state_dict(), torch.get_rng_state()))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for state, rng in results[1:]:
        assert all(torch.equal(results[0][0][name], value) for name, value in state.items())
        assert torch.equal(results[0][1], rng)
    row = next(row for row in timer.rows if row.name == "body.inside.0")
    assert row.calls == (2 if again else 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules(in_place: bool, tmp_path: Path) -> None:
    """What ``torch.compile`` returns is one row; hooks do not reach what is compiled in place."""
    torch.compiler.reset()
    model = Model()
    if in_place:
        model.body["inside"].compile(backend="eager")
    else:
        model.body["inside"] = torch.compile(model.body["inside"], backend="eager")  # type: ignore[assignment]
    timer = ModuleTimer(every_n_steps=1, table=False)
    fit(tmp_path, model, timer)
    assert {row.name for row in timer.rows} == {"heavy", "backwards"} | (set() if in_place else {"body.inside"})
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in timer.rows)


def test_another_profiler_goes_first(tmp_path: Path) -> None:
    timer = ModuleTimer(every_n_steps=1, table=False)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.warns(UserWarning, match="another profiler of torch's is open") as caught,
    ):
        fit(tmp_path, Model(), timer)
    assert len([w for w in caught if "ModuleTimer" in str(w.message)]) == 1
    assert not timer.rows


class Failing(Model):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        if index == 3:
            raise RuntimeError("no more")
        return loss


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    model = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        fit(tmp_path, model, ModuleTimer(every_n_steps=1, table=False))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.autograd._profiler_enabled()
    with pytest.raises(ValueError, match="`every_n_steps` is 0"):
        ModuleTimer(every_n_steps=0)
