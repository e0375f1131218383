"""CollapseMonitor in a real Trainer: it changes nothing, logs on the right steps, and cleans up after itself."""

from __future__ import annotations

import io
import math
import os
from copy import deepcopy

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_efficient.callbacks.collapse_monitor import CollapseMonitor
from lightning_efficient.common.match import NoMatchError

PREFIX = "efficient/collapse_monitor"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Classifier(LightningModule):
    """A timm ViT as a user writes it, with dropout; ``layers`` names the modules of the heatmap."""

    def __init__(self, manual: bool = False, build: str = "vit") -> None:
        super().__init__()
        if build == "vit":
            self.net: nn.Module = timm.create_model(
                "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=3, depth=2, num_classes=4,
                proj_drop_rate=0.1, attn_drop_rate=0.1,
            )  # fmt: skip
        elif build == "encoder":
            layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
            self.net = nn.Sequential(
                nn.Flatten(2), nn.Linear(256, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(48, 4)
            )
        else:
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.automatic_optimization = not manual
        self.fail_at = -1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if batch_idx == self.fail_at:
            raise RuntimeError("on purpose")
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data(count: int = 48) -> TensorDataset:
    g = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 3, 16, 16, generator=g), torch.randint(0, 4, (count,), generator=g))


class Trace(Callback):
    """Everything that a monitor could disturb: losses, weights, the random state, the hooks, the modes."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.rng: list[Tensor] = []
        self.modes: list[int] = []
        self.hooks: list[int] = []

    def on_after_backward(self, trainer, pl_module):
        self.modes.append(len(_get_current_function_mode_stack()))
        self.hooks.append(hooks_on(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["loss"].clone())
        self.rng.append(torch.get_rng_state())


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def fit(tmp_path, *callbacks, model=None, loader=None, logger=None, val=False, ckpt_path=None, **options):
    seed_everything(5, verbose=False)
    model = model or Classifier()
    logger = TensorBoardLogger(tmp_path, name="", version="run") if logger is None else logger
    trainer = Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks),
        **({"max_epochs": 2, "enable_checkpointing": False, "limit_val_batches": 1 if val else 0} | options),
    )  # fmt: skip
    loader = loader or DataLoader(data(), batch_size=4)
    trainer.fit(model, loader, DataLoader(data(8), batch_size=4), ckpt_path=ckpt_path)
    return trainer, model


def events(tmp_path) -> EventAccumulator:
    found = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    found.Reload()
    return found


def same_run(tmp_path, monitor: CollapseMonitor, **options) -> tuple[Trainer, Trace]:
    """Run with and without the monitor; all that a run consists of is equal, bit for bit."""
    plain, watched = Trace(), Trace()
    build = options.pop("build", Classifier)
    _, without = fit(tmp_path / "a", plain, model=_seeded(build), **deepcopy(options))
    trainer, with_ = fit(tmp_path / "b", monitor, watched, model=_seeded(build), **deepcopy(options))
    assert len(plain.losses) == len(watched.losses) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.rng, watched.rng, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(without.state_dict().values(), with_.state_dict().values(), strict=True)
    )
    assert plain.hooks == watched.hooks
    assert not _get_current_function_mode_stack()
    return trainer, watched


def _seeded(build) -> LightningModule:
    torch.manual_seed(11)
    return build()


def without_dropout() -> Classifier:
    model = Classifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def encoder() -> Classifier:
    return Classifier(build="encoder")


def tail(test, cell):
    """The fused encoder in the precisions; what the Trainer does around is the same for both."""
    if test != "test_training_is_bit_identical":
        return False
    return cell["build"] is encoder and not cell["options"].keys() <= {"precision"}


@pytest.mark.parametrize("build", [Classifier, encoder])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"val": True},
    ],
    ids=["plain", "accumulate", "bf16", "val"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_training_is_bit_identical(tmp_path, build, options):
    trainer, trace = same_run(tmp_path, CollapseMonitor(every_n_steps=2, rankme="net"), build=build, **options)
    assert math.isfinite(trainer.callback_metrics[f"{PREFIX}/entropy_min"])
    assert set(trace.modes) == {0}  # nothing is on in backward


def test_manual_optimization(tmp_path):
    build = lambda: Classifier(manual=True)  # noqa: E731
    trainer, _ = same_run(tmp_path, CollapseMonitor(every_n_steps=3), build=build)
    assert math.isfinite(trainer.callback_metrics[f"{PREFIX}/entropy_min"])


def test_a_device_context_open_around_manual_backward_survives(tmp_path):
    class WithDevice(Classifier):
        def training_step(self, batch, batch_idx):
            with torch.device("cpu"):
                super().training_step(batch, batch_idx)
                stack.append([type(mode).__name__ for mode in _get_current_function_mode_stack()])
            after.append(len(_get_current_function_mode_stack()))

    stack, after = [], []
    same_run(tmp_path, CollapseMonitor(every_n_steps=4), build=lambda: WithDevice(manual=True))
    assert all(names[-1] == "DeviceContext" for names in stack)
    assert set(after) == {0, 1}  # ours stays below until the batch ends


def test_disabled_is_bit_identical_and_logs_nothing(tmp_path):
    trainer, _ = same_run(tmp_path, CollapseMonitor(enabled=False, include=["nothing"], rankme="nothing"))
    assert not [name for name in trainer.callback_metrics if name.startswith("efficient")]
    assert not [tag for tag in events(tmp_path / "b").Tags()["scalars"] if tag.startswith("efficient")]


def test_scalars_heatmap_and_histogram_in_tensorboard(tmp_path):
    trainer, _ = fit(tmp_path, CollapseMonitor(every_n_steps=5, rankme="net.norm"), log_every_n_steps=7)
    found = events(tmp_path)
    for name in (
        "entropy_mean", "entropy_min", "entropy_normalized_min", "collapsed_fraction", "sink_fraction",
        "entropy_bound_min", "logit_norm_max", "spectral_norm_max", "rankme",
    ):  # fmt: skip
        scalars = found.Scalars(f"{PREFIX}/{name}")
        assert [s.step for s in scalars] == [0, 5, 10, 15, 20], name
        assert all(math.isfinite(s.value) for s in scalars)
        assert scalars[-1].value == pytest.approx(float(trainer.callback_metrics[f"{PREFIX}/{name}"]), rel=1e-6)
    first = {
        name: found.Scalars(f"{PREFIX}/{name}")[0].value
        for name in ("entropy_mean", "entropy_min", "collapsed_fraction")
    }
    # A fresh ViT attends almost uniformly over 16 patches and a class token.
    assert 0.99 * math.log(17) < first["entropy_min"] <= first["entropy_mean"] <= math.log(17) * (1 + 1e-6)
    assert first["collapsed_fraction"] == 0
    images = found.Images(f"{PREFIX}/attention_entropy")
    assert [i.step for i in images] == [0, 5, 10, 15, 20]
    picture = Image.open(io.BytesIO(images[0].encoded_image_string))
    assert picture.size[0] > 300
    assert picture.size[1] > 150
    tags = found.Tags()
    kinds = [set(tags[kind]) for kind in ("scalars", "images", "histograms")]
    assert sum(map(len, kinds)) == len(set.union(*kinds)), "TensorBoard shows one kind of data a tag only"
    histograms = found.Histograms(f"{PREFIX}/attention_entropy_heads")
    assert [h.step for h in histograms] == [0, 5, 10, 15, 20]
    assert histograms[0].histogram_value.num == 2 * 3


def test_values_are_those_of_the_probe_on_the_same_batch(tmp_path):
    from lightning_efficient.attention import AttentionProbe, HeadTable

    monitor = CollapseMonitor(max_samples=3, max_queries=5, exclude=["net.blocks.0"], spectral_norms=False)
    trainer, _ = fit(tmp_path, monitor, model=_seeded(without_dropout), max_steps=1)
    model = _seeded(without_dropout)
    with AttentionProbe(model, max_samples=3, max_queries=5) as probe:
        model.net(next(iter(DataLoader(data(), batch_size=4)))[0])
    (call,) = [call for call in probe.calls if call.site == "net.blocks.1.attn"]
    for name, value in HeadTable.of([call]).scalars().items():
        assert float(trainer.callback_metrics[f"{PREFIX}/{name}"]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_collapsed_head_is_counted_and_stops_the_run(tmp_path):
    class Collapses(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 6:
                with torch.no_grad():
                    self.net.blocks[1].attn.qkv.weight[8:16].mul_(1e5)  # the queries of head 1

    stop = EarlyStopping(f"{PREFIX}/entropy_normalized_min", patience=10**6, stopping_threshold=None,
                         divergence_threshold=0.05, mode="max", check_on_train_epoch_end=False)  # fmt: skip
    best = ModelCheckpoint(
        tmp_path / "ckpt", monitor=f"{PREFIX}/entropy_min", mode="max", save_on_train_epoch_end=False
    )
    trainer, _ = fit(
        tmp_path, CollapseMonitor(every_n_steps=3), stop, best, model=_seeded(Collapses), val=True,
        val_check_interval=2, max_epochs=5, enable_checkpointing=True,
    )  # fmt: skip
    assert 6 < trainer.global_step <= 8
    assert "Divergence" in stop.stopping_reason_message
    found = events(tmp_path)
    assert [s.value for s in found.Scalars(f"{PREFIX}/collapsed_fraction")] == [0, 0, pytest.approx(1 / 6)]
    bound, norm = (found.Scalars(f"{PREFIX}/{name}")[-1].value for name in ("entropy_bound_min", "logit_norm_max"))
    assert bound < 1e-3
    assert norm > 100 * found.Scalars(f"{PREFIX}/logit_norm_max")[0].value
    assert best.best_model_score > 2


def test_other_loggers_get_every_layer_in_one_row(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="csv")
    fit(tmp_path, CollapseMonitor(every_n_steps=4), logger=logger, max_epochs=1)
    rows = [row for row in logger.experiment.metrics if f"{PREFIX}/entropy_mean" in row]
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row[f"{PREFIX}/entropy_mean"]]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    for i in range(2):
        for name in ("entropy_mean", "entropy_normalized_min"):
            assert float(rows[0][f"{PREFIX}/net.blocks.{i}.attn/{name}"]) > 0


def test_cadence_counts_optimizer_steps_and_survives_resuming(tmp_path):
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}  # 6 steps an epoch
    whole = fit(tmp_path / "whole", CollapseMonitor(every_n_steps=4), model=_seeded(without_dropout), **options)
    assert [s.step for s in events(tmp_path / "whole").Scalars(f"{PREFIX}/entropy_min")] == [0, 4, 8]
    half = tmp_path / "half"
    trainer, _ = fit(
        half, CollapseMonitor(every_n_steps=4), model=_seeded(without_dropout), **(options | {"max_epochs": 1})
    )
    path = half / "state.ckpt"
    trainer.save_checkpoint(path)
    assert "CollapseMonitor" not in str(torch.load(path, weights_only=True)["callbacks"])
    fit(tmp_path / "rest", CollapseMonitor(every_n_steps=4), model=without_dropout(), ckpt_path=path, **options)
    rest, all_ = (events(tmp_path / d).Scalars(f"{PREFIX}/entropy_min") for d in ("rest", "whole"))
    assert [(s.step, s.value) for s in rest] == [(s.step, s.value) for s in all_[2:]]
    assert whole[0].global_step == 12


def test_nothing_is_computed_on_other_steps(tmp_path, monkeypatch):
    import lightning_efficient.callbacks.collapse_monitor as module

    entered, normed = [], []

    class Counted(module.AttentionProbe):
        def __enter__(self):
            entered.append(1)
            return super().__enter__()

    monkeypatch.setattr(module, "AttentionProbe", Counted)
    monkeypatch.setattr(module, "spectral_norms", lambda *a, **k: normed.append(1) or {})
    fit(tmp_path, CollapseMonitor(every_n_steps=10))
    assert len(entered) == len(normed) == 3  # steps 0, 10, 20 of 24


def test_exception_in_training_step_leaves_no_mode_or_hook(tmp_path):
    model = Classifier()
    model.fail_at = 0
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, CollapseMonitor(rankme="net"), model=model)
    assert not _get_current_function_mode_stack()
    assert hooks_on(model) == 0


def test_a_skipped_epoch_leaves_no_mode_or_hook(tmp_path):
    class Skips(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 else None

        def on_train_epoch_start(self):
            seen.append((len(_get_current_function_mode_stack()), hooks_on(self)))

    seen: list[tuple[int, int]] = []
    fit(tmp_path, CollapseMonitor(every_n_steps=1000), model=Skips())
    assert seen == [(0, 0), (0, 0)]


class Worker(Dataset):
    """Reports, from inside a worker process, whether a mode came along with the fork."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        modes = len(_get_current_function_mode_stack())
        assert os.getpid() != MAIN
        return torch.full((3, 16, 16), float(modes)), 0


MAIN = os.getpid()


@pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of")
def test_forked_dataloader_workers_are_unaffected(tmp_path):
    class Looks(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append(float(batch[0].max()))
            return super().training_step(batch, batch_idx)

    seen: list[float] = []
    loader = DataLoader(Worker(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    fit(tmp_path, CollapseMonitor(every_n_steps=1), model=Looks(), loader=loader, max_epochs=3)
    assert len(seen) == 6
    assert set(seen) == {0.0}


def test_a_model_without_attention_is_told_so_once_and_keeps_its_norms(tmp_path):
    with pytest.warns(UserWarning, match="CollapseMonitor: no attention call was seen at all") as caught:
        trainer, _ = fit(tmp_path, CollapseMonitor(every_n_steps=4), model=Classifier(build="cnn"))
    assert len([w for w in caught if "CollapseMonitor" in str(w.message)]) == 1
    names = {name for name in trainer.callback_metrics if name.startswith(PREFIX)}
    assert names == {f"{PREFIX}/spectral_norm_max"}


def test_wrong_names(tmp_path):
    with pytest.raises(NoMatchError, match=r"'net.blocs.0' matches no module name \(did you mean 'net.blocks.0'"):
        fit(tmp_path, CollapseMonitor(include=["net.blocs.0"]))
    with pytest.raises(NoMatchError, match=r"`rankme` 'net.nrom' matches no.*'net.norm'"):
        fit(tmp_path, CollapseMonitor(rankme="net.nrom"))
    with pytest.raises(ValueError, match=r"rankme='net.patch_embed.proj'. returns \(4, 24, 4, 4\)"):
        fit(tmp_path, CollapseMonitor(rankme="net.patch_embed.proj"))
    with pytest.raises(ValueError, match="more than one CollapseMonitor"):
        fit(tmp_path, CollapseMonitor(), CollapseMonitor(include=["net.blocks.0"]))
    for name in ("every_n_steps", "max_samples", "max_queries"):
        with pytest.raises(ValueError, match=f"`{name}` is 0"):
            CollapseMonitor(**{name: 0})
    with pytest.raises(ValueError, match="threshold"):
        CollapseMonitor(threshold=5)


def test_diverged_logits_show_as_nan(tmp_path):
    class Diverges(Classifier):
        def on_train_start(self):
            with torch.no_grad():
                self.net.blocks[0].attn.qkv.weight[0] = math.nan

    trainer, _ = fit(tmp_path, CollapseMonitor(), model=Diverges(), max_steps=1)
    for name in ("entropy_min", "entropy_normalized_min", "logit_norm_max", "spectral_norm_max"):
        assert trainer.callback_metrics[f"{PREFIX}/{name}"].isnan(), name
    assert len(events(tmp_path).Images(f"{PREFIX}/attention_entropy")) == 1


def test_compiled_model_is_measured_without_recompiling(tmp_path):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend=counter)

    frames: list[int] = []

    class Frames(Callback):
        def on_train_batch_end(self, *args):
            frames.append(counter.frame_count)

    trainer, _ = fit(tmp_path, CollapseMonitor(every_n_steps=3), Frames(), model=Compiled(), max_epochs=1)
    assert frames[0] == 0  # the first step is measured, hence eager
    assert frames[1] > 0
    assert len(set(frames[1:])) == 1
    assert f"{PREFIX}/entropy_min" in trainer.callback_metrics


class Outcome(Callback):
    """Writes what each process ends with: its monitored values, and a digest of its weights."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        values = sorted((n, float(v)) for n, v in trainer.callback_metrics.items() if n.startswith(PREFIX))
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        torch.save((values, weights), self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore")
def test_two_processes_agree_and_train_as_without_the_monitor(tmp_path):
    for name, monitors in (("plain", []), ("watched", [CollapseMonitor(every_n_steps=2)])):
        folder = tmp_path / name
        folder.mkdir()
        fit(folder, *monitors, Outcome(folder), model=_seeded(Classifier), devices=2, strategy="ddp_fork", max_steps=3)
    (first, weights), (second, same) = (torch.load(tmp_path / "watched" / f"rank{r}.pt") for r in range(2))
    assert first == second
    assert f"{PREFIX}/entropy_min" in dict(first)
    assert torch.equal(weights, same)
    assert torch.equal(weights, torch.load(tmp_path / "plain" / "rank0.pt")[1])
    assert [s.step for s in events(tmp_path / "watched").Scalars(f"{PREFIX}/entropy_min")] == [0, 2]
