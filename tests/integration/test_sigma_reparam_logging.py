"""What SigmaReparam writes, and under which strategies it runs at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sigma_runs import trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from zoo import Classifier, Manual, loader

from lightning_efficient import SigmaReparam

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:distutils Version classes are deprecated"),
]

SCRIPTS = Path(__file__).parent / "scripts"
NAMES = {f"efficient/sigma_reparam/{name}" for name in ("sigma_max", "gain_min", "gain_mean", "gain_max")}


def events(root: Path) -> EventAccumulator:
    (folder,) = {path.parent for path in root.rglob("events.out*")}
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def steps_of(found: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in found.Scalars(tag)]


class Sometimes(Manual):
    """Manual optimization that steps on every second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self._loss(batch)
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
        self.log("train_loss", loss)


class Often(Classifier):
    """Manual optimization, one optimizer, three steps a batch."""

    def __init__(self, net: str) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(3):
            loss = self._loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(
    ("kind", "every", "options", "due"),
    [
        (Classifier, 1, {}, 14),
        (Classifier, 3, {}, 4),
        (Classifier, 2, {"accumulate_grad_batches": 3}, 3),
        (Manual, 4, {}, 3),
        (Sometimes, 3, {}, 4),
        (Often, 3, {}, 4),
        (Classifier, 0, {}, 0),
    ],
    ids=["every", "third", "accumulation", "two optimizers", "seldom", "often", "never"],
)
def test_scalars_are_written_at_the_trainers_logging_steps(
    kind: Any, every: int, options: dict[str, Any], due: int, tmp_path: Path
) -> None:
    """Two epochs of seven batches; the user's own metric says which steps the Trainer writes."""
    callback, computed = SigmaReparam(), []
    quantities = callback.quantities
    callback.quantities = lambda t: computed.append(1) or quantities(t)  # type: ignore[method-assign]
    logger = TensorBoardLogger(tmp_path, name="run")
    t = trainer(tmp_path, callback, logger=logger, log_every_n_steps=every, max_steps=-1, max_epochs=2, **options)
    t.fit(kind("encoder"), loader(7))
    found = events(tmp_path)
    assert len(computed) == due, "nothing is computed for steps that are not written"
    if due == 0:
        assert not [tag for tag in found.Tags()["scalars"] if tag.startswith(("efficient", "train_loss"))]
        return
    assert len(steps_of(found, "train_loss")) == due
    for name in NAMES:
        assert steps_of(found, name) == steps_of(found, "train_loss"), name
    assert all(0 < event.value < 1e3 for name in NAMES for event in found.Scalars(name))


def test_scalars_of_a_resumed_run_are_written_at_its_logging_steps(tmp_path: Path) -> None:
    first = trainer(tmp_path, SigmaReparam(), max_steps=5)
    first.fit(Classifier("encoder"), loader(8))
    first.save_checkpoint(tmp_path / "a.ckpt")
    logger = TensorBoardLogger(tmp_path, name="run")
    t = trainer(tmp_path, SigmaReparam(), logger=logger, log_every_n_steps=3, max_steps=14)
    t.fit(Classifier("encoder"), loader(8), ckpt_path=tmp_path / "a.ckpt")
    found = events(tmp_path)
    assert len(steps_of(found, "train_loss")) == 3
    for name in NAMES:
        assert steps_of(found, name) == steps_of(found, "train_loss")


def test_values_are_those_of_the_weights(tmp_path: Path) -> None:
    callback, module = SigmaReparam(), Classifier("encoder")
    t = trainer(tmp_path, callback, max_steps=5)
    t.fit(module, loader(5))
    norms = [torch.linalg.matrix_norm(p.detach(), 2) for n, p in module.named_parameters() if p.ndim > 1]
    logged = {name.rpartition("/")[2]: value for name, value in t.callback_metrics.items() if name in NAMES}
    # |gain| is the network's norm up to the one power iteration a step
    torch.testing.assert_close(logged["gain_max"], max(norms), rtol=0.02, atol=0)
    torch.testing.assert_close(logged["gain_min"], min(norms), rtol=0.02, atol=0)
    torch.testing.assert_close(logged["gain_mean"], torch.stack(norms).mean(), rtol=0.02, atol=0)


def test_early_stopping_can_watch_it(tmp_path: Path) -> None:
    stop = EarlyStopping(
        "efficient/sigma_reparam/gain_max", stopping_threshold=100.0, patience=99, check_on_train_epoch_end=True
    )
    t = trainer(tmp_path, SigmaReparam(), stop, max_steps=-1, max_epochs=5)
    t.fit(Classifier("encoder"), loader(3))
    assert t.current_epoch == 1, "the gain was below the threshold after one epoch"
    assert "gain_max = " in str(stop.stopping_reason_message)


def test_barebones(tmp_path: Path) -> None:
    t = Trainer(barebones=True, accelerator="cpu", devices=1, max_steps=2, callbacks=[SigmaReparam()])
    with pytest.warns(UserWarning, match=r"barebones"):
        t.fit(Classifier("encoder"), loader())
    assert t.global_step == 2


# -- hyper-parameters ------------------------------------------------------------------------------------------------


def hparams(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the event file's session says, and what hparams.yaml says."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events(root).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    session = {key: getattr(value, value.WhichOneof("kind")) for key, value in data.session_start_info.hparams.items()}
    (path,) = root.rglob("hparams.yaml")
    return session, yaml.safe_load(path.read_text())


def test_hyper_parameters_are_one_record_with_the_users(tmp_path: Path) -> None:
    records = {}
    for name, callback in (("on", SigmaReparam(qkv="split")), ("off", SigmaReparam(enabled=False))):
        t = trainer(tmp_path / name, callback, logger=TensorBoardLogger(tmp_path / name))
        t.fit(Classifier("encoder", lr=0.004), loader())
        records[name] = hparams(tmp_path / name)
    for session, file in records.values():
        assert session["lr"] == file["lr"] == 0.004
        assert session["net"] == file["net"] == "encoder"
        assert session.keys() == file.keys()
    arguments = {k: v for k, v in SigmaReparam().config().items() if k != "enabled"}
    more = records["on"][0].keys() - records["off"][0].keys()
    assert more == {f"efficient/sigma_reparam/{name}" for name, value in arguments.items() if value is not None}
    assert records["off"][0].keys() <= records["on"][0].keys()
    assert list(records["on"][1])[:1] == ["build"], "the user's come first"
    assert records["on"][0]["efficient/sigma_reparam"] == 1
    assert records["off"][0]["efficient/sigma_reparam"] == 0
    assert (records["on"][1]["efficient/sigma_reparam"], records["off"][1]["efficient/sigma_reparam"]) == (True, False)
    assert records["on"][0]["efficient/sigma_reparam/qkv"] == "split"
    assert records["on"][0]["efficient/sigma_reparam/learnable_gain"] == 1
    assert "qkv" not in Classifier("encoder").hparams


def test_hyper_parameters_the_user_keeps_out_of_the_logs_stay_out(tmp_path: Path) -> None:
    class Private(Classifier):
        def __init__(self) -> None:
            super().__init__("encoder")
            self.save_hyperparameters({"net": "encoder", "token": "secret"}, logger=False)

    trainer(tmp_path, SigmaReparam(), logger=TensorBoardLogger(tmp_path)).fit(Private(), loader())
    session, file = hparams(tmp_path)
    assert session.keys() == file.keys()
    assert not session.keys() & {"net", "token"}
    assert session["efficient/sigma_reparam"] == 1


def test_hyper_parameters_in_other_loggers_and_without_the_users(tmp_path: Path) -> None:
    class Bare(Classifier):
        def __init__(self) -> None:
            super().__init__("encoder")
            self._hparams_initial = None  # as a module that never called save_hyperparameters

    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    trainer(tmp_path, SigmaReparam(), logger=loggers).fit(Bare(), loader())
    for path in tmp_path.rglob("hparams.yaml"):
        assert yaml.safe_load(path.read_text())["efficient/sigma_reparam"] is True
    assert len(list(tmp_path.rglob("hparams.yaml"))) == 2


def test_two_of_them_are_one_record(tmp_path: Path) -> None:
    both = SigmaReparam(include=["net.encoder"]), SigmaReparam(include=["net.head"], init="one")
    trainer(tmp_path, *both, logger=TensorBoardLogger(tmp_path)).fit(Classifier("encoder"), loader())
    session, _ = hparams(tmp_path)
    assert session["efficient/sigma_reparam/include"] == "['net.encoder']; ['net.head']"
    assert session["efficient/sigma_reparam/init"] == "preserve; one"
