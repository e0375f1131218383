"""Hyper-parameters, pictures and reports arrive in loggers other than TensorBoard's."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from PIL import Image
from zoo import Classifier, loader

from lightning_efficient import CollapseMonitor, ModuleTimer, RepresentationMonitor, SigmaReparam
from lightning_efficient.trainer.showing import show_picture, show_text

PICTURES = ("collapse_monitor/attention_entropy", "module_timer/icicle", "representation_monitor/spectrum")


class Own(Classifier):
    """With hyper-parameters of its user."""

    def __init__(self) -> None:
        super().__init__("encoder")
        self.save_hyperparameters({"depth": 2, "recipe": "own"})


def fit(logger: Logger, folder: Path) -> None:
    callbacks: list[Any] = [
        SigmaReparam(exclude=["head"]), CollapseMonitor(every_n_steps=2), ModuleTimer(every_n_steps=2, table=False),
        RepresentationMonitor(module="encoder", metrics=["rankme"]),
    ]  # fmt: skip
    pl.Trainer(
        max_steps=4, callbacks=callbacks, logger=logger, default_root_dir=folder, enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0,
    ).fit(Own(), loader(), loader())  # fmt: skip


def check_hparams(hparams: Mapping[str, Any]) -> None:
    found = {name: str(value) for name, value in hparams.items()}
    assert (found["depth"], found["recipe"]) == ("2", "own")
    assert found["efficient/sigma_reparam"] == "True"
    assert found["efficient/norm_swap"] == "False"
    assert found["efficient/sigma_reparam/exclude"] == "['head']"


def test_csv(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(logger, tmp_path)
    folder = Path(logger.log_dir)
    check_hparams(yaml.safe_load((folder / "hparams.yaml").read_text()))
    for name in PICTURES:
        drawn = sorted((folder / "shown/efficient" / name).iterdir())
        assert drawn[-1].name in ("step_00000002.png", "step_00000004.png")
        with Image.open(drawn[-1]) as image:
            assert min(image.size) > 50
    (report,) = (folder / "shown/efficient/module_timer/table").iterdir()
    assert "net.encoder.layers.0" in report.read_text("utf-8")


class WandbLike(Logger):
    """What Lightning's WandbLogger offers, and nothing of its package."""

    def __init__(self) -> None:
        super().__init__()
        self.hparams: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.images: dict[str, list[Any]] = {}
        self.texts: dict[str, Any] = {}

    name, version = "own", "0"  # type: ignore[assignment]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams |= params

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert isinstance(images, list)
        self.images.setdefault(key, []).append((step, *images))

    def log_text(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: Any = None
    ) -> None:
        self.texts[key] = (step, columns, data)


def test_a_logger_with_the_interface_of_wandb(tmp_path: Path) -> None:
    logger = WandbLike()
    fit(logger, tmp_path)
    check_hparams(logger.hparams)
    assert set(logger.images) == {f"efficient/{name}" for name in PICTURES}
    assert [step for step, _ in logger.images["efficient/collapse_monitor/attention_entropy"]] == [0, 2]
    assert all(isinstance(image, Image.Image) for calls in logger.images.values() for _, image in calls)
    step, columns, data = logger.texts["efficient/module_timer/table"]
    assert (step, columns) == (4, ["text"])
    assert "net.encoder.layers.0" in data[0][0]
    assert "efficient/representation_monitor/rankme" in logger.metrics


class Client:
    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def log_image(self, run_id: str, image: Any, artifact_file: str) -> None:
        image.save(io.BytesIO(), format="png")
        self.files[f"{run_id}/{artifact_file}"] = image

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.files[f"{run_id}/{artifact_file}"] = text


class MLflowLike(MLFlowLogger):
    run_id = "run"  # type: ignore[assignment]

    def __init__(self) -> None:
        self.client = Client()

    @property
    def experiment(self) -> Any:
        return self.client


class Nothing(Logger):
    """Shows neither pictures nor texts."""

    name, version = "own", "0"  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...


def test_the_client_of_mlflow_and_loggers_without_pictures() -> None:
    from matplotlib.figure import Figure

    drawn = []

    def draw() -> Figure:
        drawn.append(1)
        return Figure()

    for loggers in ([], [Nothing()]):
        show_picture(loggers, "a/b", draw, 3)
        show_text(loggers, "a/b", "text", 3)
    assert not drawn, "nobody would see it"
    logger = MLflowLike()
    show_picture([logger, Nothing(), WandbLike()], "a/b", draw, 3)
    show_text([logger], "a/b", "text", 3)
    assert list(logger.client.files) == ["run/shown/a/b/step_00000003.png", "run/shown/a/b/step_00000003.txt"]
    assert len(drawn) == 1, "once for all of them"


@pytest.mark.filterwarnings("ignore")  # of the package
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(logger, tmp_path)
    check_hparams(logger.experiment.config)
    folder = Path(logger.experiment.dir) / "media"
    wandb.finish()
    images = sorted(str(file.relative_to(folder / "images")) for file in (folder / "images").rglob("*.png"))
    for name in PICTURES:
        assert any(image.startswith(f"efficient/{name}") for image in images), images
    tables = [json.loads(file.read_text()) for file in (folder / "table").rglob("*.json")]
    assert any("net.encoder.layers.0" in str(table["data"]) for table in tables)


@pytest.mark.filterwarnings("ignore")  # of the package
def test_mlflow_offline(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}", artifact_location=(tmp_path / "a").as_uri())
    fit(logger, tmp_path)
    run = logger.experiment.get_run(logger.run_id)
    check_hparams(run.data.params)
    assert "efficient/representation_monitor/rankme" in run.data.metrics
    files = [str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("step_*")]
    for name in (*PICTURES, "module_timer/table"):
        assert any(f"shown/efficient/{name}/step_0000000" in file for file in files), files
