"""``HESSOPruning`` in a Trainer: what it promises, what it refuses, and what it does when things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import HESSOPruning, MagnitudePruning, TempScale
from lightning_efficient.common.registry import METHODS
from lightning_efficient.common.running import as_call
from lightning_efficient.deploy.measure import count_macs
from lightning_efficient.lifecycle import recipe
from lightning_efficient.lifecycle.recipe import RecipeError
from lightning_efficient.structured.hesso import SHRINKING
from lightning_efficient.structured.slim import apply_slim
from lightning_efficient.testing.case import ResumableLoader
from lightning_efficient.testing.checks import flat


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self, optimizer: Callable[..., Any] = torch.optim.AdamW, lr: float = 1e-2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Net()
        self.optimizer, self.lr = optimizer, lr
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.lr)


def loader(batches: int = 20) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batches * 8, 1, 8, 8, generator=g)
    return DataLoader(TensorDataset(x, torch.randint(0, 4, (batches * 8,), generator=g)), batch_size=8)


def trainer(*callbacks: Callback, steps: int = 20, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "max_steps": steps, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **quiet | kwargs)


def hesso(**arguments: Any) -> HESSOPruning:
    return HESSOPruning(**{"start": 2, "duration": 12, "periods": 3} | arguments)


def zeros(callback: HESSOPruning, module: nn.Module) -> dict[str, int]:
    params = dict(module.named_parameters())
    return {name: int(group.zeros(params).sum()) for name, group in callback.groups.found.items()}


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=1e-2),
        torch.optim.RMSprop,
        torch.optim.Adagrad,
    ],
    ids=["adamw", "sgd", "rmsprop", "adagrad"],
)
def test_exactly_half_of_the_units_are_zero_and_stay_zero(optimizer: Any) -> None:
    """36 units, 18 of them gone after step 14, none back after six more steps of any optimizer."""
    seen: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(sum(zeros(callback, pl_module).values()))

    callback, module = hesso(), Module(optimizer)
    trainer(callback, Count()).fit(module, loader())
    assert seen == [0] * 5 + [6] * 4 + [12] * 4 + [18] * 7
    assert all(count < callback.groups.found[name].units for name, count in zeros(callback, module).items())
    x = torch.randn(4, 1, 8, 8)
    module.eval()
    with torch.no_grad():
        masked = module(x)
        apply_slim(module, callback.keep, callback.groups)
        torch.testing.assert_close(module(x), masked, rtol=0, atol=1e-6)
    assert module.net[0].out_channels + module.net[4].out_channels + module.net[8].out_features == 18


def test_a_straight_line_to_zero_while_the_learning_rate_is_zero() -> None:
    """Law (D - k) / D on every shrinking unit, against a copy of the weights when it was chosen."""
    start: dict[str, Tensor] = {}
    worst: list[float] = []

    class Line(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            params = dict(pl_module.named_parameters())
            step, d = trainer.global_step, 8
            if not start:
                start.update({n: p.detach().clone() for n, p in params.items()})
            if 2 < step < 2 + d:
                marked = callback.hesso.marked(SHRINKING)
                for name, group in callback.groups.found.items():
                    for part in group.produced:
                        if part.name in params:
                            now, then = (part.rows(t[part.name].detach())[marked[name]] for t in (params, start))
                            worst.append(float((now - then * (d - (step - 2)) / d).abs().max()) if len(now) else 0.0)

    callback = hesso(duration=8, periods=1)
    trainer(callback, Line(), steps=12).fit(Module(torch.optim.SGD, lr=0.0), loader())
    assert max(worst) < 1e-6
    assert sum(callback.groups.found[name].units - len(kept) for name, kept in callback.keep.items()) == 18


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_targets_in_parameters_and_multiply_accumulates(unit: Any) -> None:
    def size(module: Module) -> float:
        if unit == "params":
            return float(sum(p.numel() for p in module.parameters()))
        return float(count_macs(module.eval(), as_call(torch.zeros(2, 1, 8, 8))))

    callback, module = hesso(target=0.6, unit=unit), Module()
    before = size(deepcopy(module))
    trainer(callback).fit(module, loader())
    apply_slim(module, callback.keep, callback.groups)
    gone = 1 - size(module) / before
    assert 0.6 <= gone < 0.7


def test_logs_and_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        trainer(hesso(), logger=logger).fit(Module(), loader())
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    header, *lines = text.splitlines()
    assert {"efficient/hesso_pruning/removed", "efficient/hesso_pruning/shrinking"} <= set(header.split(","))
    column = header.split(",").index("efficient/hesso_pruning/removed")
    values = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 0.5)
    assert any("50.0% of the units pruned; units left: net.0 8 -> " in r.getMessage() for r in caplog.records)


def test_a_run_that_ends_early_says_so() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 8

    callback = hesso()
    with pytest.warns(UserWarning, match="ended at step 8, and its schedule ends at step 14: it is in period 2 of 3"):
        trainer(callback, Stop()).fit(Module(), loader())
    widths = {name: group.units for name, group in callback.groups.found.items()}
    assert sum(widths[name] - len(units) for name, units in callback.keep.items()) == 6


@pytest.mark.parametrize(
    ("arguments", "steps", "said"),
    [
        ({"target": 0.99}, 20, r"`target`=0.99 of the groups cannot be reached"),
        ({"group_divisible": 16}, 20, r"cannot be reached.*may lose none"),
        ({"include": ["net.10"]}, 20, "net.10"),
        ({"include": ["nothing"]}, 20, "nothing"),
        ({"start": 0.1, "duration": 0.2, "periods": 10}, 20, "10 `periods` need at least one step each"),
        ({"start": 2, "duration": 30}, 20, "end at step 32"),
        ({"cric": True, "duration": 4, "periods": 3}, 20, "cric=True needs 5 steps for 3 cycles"),
    ],
)
def test_refused_before_anything_changes(arguments: dict[str, Any], steps: int, said: str) -> None:
    module = Module()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"(?s){said}"):
        trainer(hesso(**arguments), steps=steps).fit(module, loader())
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_masks_and_structured_pruning_exclude_each_other() -> None:
    message = METHODS["magnitude_pruning"].excludes["hesso_pruning"]
    with pytest.raises(ValueError, match="cannot be used together") as caught:
        trainer(hesso(), MagnitudePruning()).fit(Module(), loader())
    assert message in str(caught.value)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hesso") / "half.ckpt"
    trainer(hesso(), SaveAt(8, path)).fit(Module(), loader())
    return path


def test_the_file_says_which_units_stay(half: Path) -> None:
    content = torch.load(half, weights_only=True)
    entry = next(e for e in recipe.read(content) if e.method == "hesso_pruning")
    widths = {"net.0": 8, "net.4": 12, "net.8": 16}
    gone = {name: widths[name] - len(units) for name, units in entry.config["keep"].items()}
    assert sum(gone.values()) == 6
    assert set(content["state_dict"]) == set(Module().state_dict())


@pytest.mark.parametrize(
    ("callbacks", "error", "said"),
    [
        (lambda: [hesso(target=0.4)], RecipeError, "`target`: 0.5 then, 0.4 now"),
        (lambda: [hesso(periods=2)], RecipeError, "`periods`: 3 then, 2 now"),
        (lambda: [hesso(enabled=False)], RecipeError, "switches off"),
        (lambda: [hesso(exclude=["net.0"])], RecipeError, "Resume with the same `include` and `exclude`"),
        (lambda: [MagnitudePruning(start=2, length=4)], RecipeError, "holds what .*HESSOPruning.* pruned"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_resuming_with_other_arguments(half: Path, callbacks: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        trainer(*callbacks()).fit(Module(), loader(), ckpt_path=half)


def test_resuming_without_the_callback_warns(half: Path) -> None:
    """Lightning's own warning; the zeros are weights like others then."""
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer().fit(Module(), ResumableLoader(loader()), ckpt_path=half)


def test_resumed_with_another_length_the_schedule_goes_on_in_steps(tmp_path: Path) -> None:
    path, fractions = tmp_path / "a.ckpt", {"start": 0.1, "duration": 0.5, "periods": 3}
    whole, long = Module(), Module()
    first = hesso(**fractions)
    trainer(first, SaveAt(8, path)).fit(whole, ResumableLoader(loader()))
    again = hesso(**fractions)
    trainer(again, steps=40).fit(long, ResumableLoader(loader()), ckpt_path=path)
    assert again.standing.schedule == first.standing.schedule == (2, 10, 3)
    assert again.keep == first.keep


# -- CRIC ------------------------------------------------------------------------------------------------------------


def cric(**arguments: Any) -> HESSOPruning:
    return hesso(**{"cric": True, "start": 2, "duration": 13, "periods": 3} | arguments)


def test_cric_tries_goes_back_and_meets_the_target(caplog: Any) -> None:
    weights: dict[int, dict[str, Tensor]] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            weights[trainer.global_step] = {n: t.detach().clone() for n, t in pl_module.named_parameters()}

    callback, module = cric(), Module()
    with caplog.at_level("INFO"):
        trainer(callback, Watch()).fit(module, loader())
    cycles = callback._cycles
    assert cycles is not None
    assert cycles.decided is not None
    assert sum(zeros(callback, module).values()) == 18
    # A look at step 2; cycles of three steps begin after step 3; each that ends goes back to the weights of step 3.
    for begin in range(6, cycles.decided + 1, 3):
        assert all(torch.equal(weights[3][n], weights[begin][n]) for n in weights[3])
    assert not all(torch.equal(weights[3][n], weights[5][n]) for n in weights[3])
    assert cycles.undone == cycles.decided - 3
    assert cycles.forwards == 1 + 3 * 3
    assert cycles.snapshot is None
    assert any("CRIC: " in r.getMessage() and "MiB" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("step", [2, 3, 5, 8, 13])
def test_cric_resumes_exactly(step: int, tmp_path: Path) -> None:
    results = []
    for resumed in (False, True):
        torch.manual_seed(0)
        extra = [] if resumed else [SaveAt(step, tmp_path / "half.ckpt")]
        run, path = trainer(cric(), *extra), tmp_path / f"{resumed}.ckpt"
        run.fit(Module(), ResumableLoader(loader()), ckpt_path=tmp_path / "half.ckpt" if resumed else None)
        run.save_checkpoint(path)
        content = flat(torch.load(path, weights_only=True))
        results.append({k: v for k, v in content.items() if isinstance(v, Tensor)})
    assert results[0].keys() == results[1].keys()
    assert [k for k in results[0] if not torch.equal(results[0][k], results[1][k])] == []


def test_cric_needs_a_loss() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="Use cric=False"):
        trainer(cric()).fit(Manual(), loader())


def test_a_temperature_in_transition_counts_steps_not_shrinkings() -> None:
    """Shrinking a weight between two steps must not move on the schedule of another transform on it."""
    timm = pytest.importorskip("timm")

    class Vit(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.models.VisionTransformer(
                img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=1, num_heads=2, mlp_ratio=2, num_classes=4
            )

    scale = TempScale(tau=2.0, transition=6)
    trainer(hesso(include=["net.blocks.*"]), scale).fit(Vit(), loader())
    assert {int(t.step) for t in scale._transforms.values()} == {20}  # type: ignore[attr-defined]


def test_with_sigma_reparam_and_prepbn_a_folded_smaller_verified_model() -> None:
    """Three methods in one run: norms that fold, weights with a gain, units that go; then nothing of this package."""
    from lightning_efficient import PRepBN, SigmaReparam, export

    timm = pytest.importorskip("timm")

    class Vit(Module):
        def __init__(self) -> None:
            super().__init__(lr=1e-3)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = timm.models.VisionTransformer(
                    img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2, num_classes=4
                )

    module, x = Vit(), next(iter(loader()))[0]
    before = sum(p.numel() for p in module.parameters())
    callback = hesso(include=["net.blocks.*"])
    run = trainer(SigmaReparam(), PRepBN(transition=0.5), callback)
    run.fit(module, loader())
    assert sum(zeros(callback, module).values()) == sum(g.units for g in callback.groups.found.values()) // 2
    small = export(module, x, tolerance=1e-4)
    after = sum(p.numel() for p in small.parameters())
    assert after < 0.8 * before
    assert small.net.blocks[0].mlp.fc1.out_features < 48
    assert not [m for m in small.modules() if type(m).__module__.startswith("lightning_efficient")]
    assert not [m for m in small.modules() if isinstance(m, (nn.BatchNorm1d, nn.LayerNorm))]
    with torch.no_grad():
        torch.testing.assert_close(small(x), module.eval()(x), rtol=1e-4, atol=1e-4)
