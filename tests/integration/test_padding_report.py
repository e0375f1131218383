"""PaddingReport: the mask of any batch, found by what it does; figures in closed form; a run that does not notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from length_models import PAD, VOCABULARY, Tagger, Texts, collate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_efficient import PaddingReport


@dataclass
class Pack:
    ids: Tensor
    hidden: Tensor


def as_mapping(batch: dict[str, Tensor]) -> Any:
    return batch


def as_tuple(batch: dict[str, Tensor]) -> Any:
    """Padding is True, as torch's own layers want it, behind labels of the same shape."""
    ids, keep = batch["input_ids"], batch["attention_mask"]
    tags = torch.where(keep == 1, (ids > 8).long(), -100)
    return (ids, tags), (keep == 0)


def as_dataclass(batch: dict[str, Tensor]) -> Any:
    return Pack(batch["input_ids"], torch.where(batch["attention_mask"] == 1, 0.0, float("-inf"))[:, None, None])


def as_float(batch: dict[str, Tensor]) -> Any:
    """Embedded already; 1.0 where a token counts; ``tags`` are 0 and 1 as well."""
    ids = batch["input_ids"]
    features = nn.functional.one_hot(ids, VOCABULARY).float()
    return {"tags": (ids > 8).long(), "x": features, "keep": batch["attention_mask"].float()}


class Reader(LightningModule):
    """Classifies texts from any of these batches."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Linear(VOCABULARY, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def training_step(self, batch: Any, _: int) -> dict[str, Tensor]:
        tags = None
        if self.form == "mapping":
            ids, hidden = batch["input_ids"], batch["attention_mask"] == 0
        elif self.form == "tuple":
            (ids, tags), hidden = batch
        elif self.form == "dataclass":
            ids, hidden = batch.ids, batch.hidden.flatten(1) < 0
        else:
            ids, hidden, tags = batch["x"], batch["keep"] == 0, batch["tags"]
        x = ids if ids.is_floating_point() else nn.functional.one_hot(ids, VOCABULARY).float()
        out = self.encoder(self.embed(x), src_key_padding_mask=hidden)
        keep = (~hidden)[..., None]
        goal = 0.0 if tags is None else tags[..., None]
        return {"loss": ((out - goal).square() * keep).sum() / keep.sum()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


FORMS = {"mapping": as_mapping, "tuple": as_tuple, "dataclass": as_dataclass, "float": as_float}


def data(form: str = "mapping", count: int = 24, width: int | None = None) -> DataLoader[Any]:
    def shaped(samples: list[dict[str, Any]]) -> Any:
        batch = collate(samples)
        if width is not None:
            more = width - batch["input_ids"].shape[1]
            batch = {k: nn.functional.pad(v, (0, more)) if v.dim() == 2 else v for k, v in batch.items()}
        return FORMS[form](batch)

    return DataLoader(Texts(count), 4, collate_fn=shaped)


def fit(root: Path, model: LightningModule, loader: Any, *callbacks: Any, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, "logger": False} | kwargs
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False, default_root_dir=root,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(model, loader)
    return trainer


def expected(count: int = 24, width: int | None = None) -> tuple[float, float]:
    """Fill, and share of a Transformer's compute at width 12, from the texts themselves."""
    sizes = torch.tensor(Texts(count).n_tokens, dtype=torch.float64).split(4)  # type: ignore[no-untyped-call]
    longest = [width or float(some.max()) for some in sizes]
    real, full = sum(float(s.sum()) for s in sizes), sum(4 * n for n in longest)

    def cost(n: Any) -> Any:
        return 12 * n * 12**2 + 2 * n**2 * 12

    return real / full, 1 - sum(float(cost(s).sum()) for s in sizes) / sum(4 * cost(n) for n in longest)


@pytest.mark.parametrize("form", FORMS)
def test_the_mask_is_found_in_any_batch(form: str, tmp_path: Path) -> None:
    trainer = fit(tmp_path, Reader(form), data(form), PaddingReport())
    fill, wasted = expected()
    logged = trainer.callback_metrics
    assert float(logged["efficient/padding_report/fill"]) == pytest.approx(fill, rel=1e-5)
    assert float(logged["efficient/padding_report/wasted"]) == pytest.approx(wasted, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("tuple", {"mask": "1"}),
        ("tuple", {"mask": "1", "keeps": "zero"}),
        ("tuple", {"mask": "0.0", "pad_id": PAD}),
        ("tuple", {"pad_id": PAD}),
        ("float", {"mask": "keep"}),
    ],
)
def test_it_can_be_named(form: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    trainer = fit(tmp_path, Reader(form), data(form), PaddingReport(**arguments), max_epochs=1)
    assert float(trainer.callback_metrics["efficient/padding_report/fill"]) == pytest.approx(expected()[0], rel=1e-5)


def test_lengths_are_a_mask_as_well(tmp_path: Path) -> None:
    class Lengths(Reader):
        def training_step(self, batch: Any, index: int) -> Any:
            hidden = torch.arange(batch[0].shape[1])[None] >= batch[1][:, None]
            return super().training_step({"input_ids": batch[0], "attention_mask": ~hidden}, index)

    loader = DataLoader(Texts(24), 4, collate_fn=lambda s: ((b := collate(s))["input_ids"], b["attention_mask"].sum(1)))
    trainer = fit(tmp_path, Lengths("mapping"), loader, PaddingReport(mask="1"), max_epochs=1)
    assert float(trainer.callback_metrics["efficient/padding_report/fill"]) == pytest.approx(expected()[0], rel=1e-5)


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_the_run_does_not_notice(form: str, tmp_path: Path) -> None:
    weights, states = [], []
    for callbacks in ([PaddingReport()], [PaddingReport(enabled=False)], []):
        torch.manual_seed(3)
        model = Reader(form)
        fit(tmp_path, model, data(form), *callbacks)
        weights.append(model.state_dict())
        states.append(torch.get_rng_state())
    for other, state in zip(weights[1:], states[1:], strict=True):
        assert all(torch.equal(weights[0][name], value) for name, value in other.items())
        assert torch.equal(states[0], state)


class Pixels(LightningModule):
    """No padding anywhere; two tensors of one shape, one of 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_without_a_mask_there_is_one_warning(tmp_path: Path) -> None:
    loader = DataLoader([(torch.randn(6), (torch.rand(6) > 0.5).float()) for _ in range(48)], 2)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no mask of padding was found in the first 10 batches") as caught:
        trainer = fit(tmp_path, Pixels(), loader, PaddingReport())
    assert len([w for w in caught if "PaddingReport" in str(w.message)]) == 1
    assert not [name for name in trainer.callback_metrics if "padding" in name]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`keeps` must be null or one of 'nonzero', 'zero'; got 'ones'"):
        PaddingReport(mask="m", keeps="ones")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`keeps` is 'zero' and `mask` is None"):
        PaddingReport(keeps="zero")
    with pytest.raises(ValueError, match=r"`d_model` is 0"):
        PaddingReport(d_model=0)
    with pytest.raises(
        ValueError, match=r"`mask` is 'mask', and the batch has no tensor of that name; it has \{'input_ids"
    ):
        fit(tmp_path, Reader("mapping"), data(), PaddingReport(mask="mask"))


def test_logs_picture_and_advice(tmp_path: Path) -> None:
    report = PaddingReport()
    loggers = [TensorBoardLogger(tmp_path, "tb", ""), CSVLogger(tmp_path, "csv", "")]
    fit(tmp_path, Reader("mapping"), data(width=80), report, logger=loggers)
    fill, wasted = expected(width=80)
    assert f"{1 - fill:.0%} of the tokens of an epoch are padding" in report.advice
    assert f"{wasted:.0%} of the compute" in report.advice
    assert "at d_model 12" in report.advice
    assert f"padding each to its own would make the fill {expected()[0]:.2f}" in report.advice
    assert "LengthGroupedBatchSampler would have a fill of 0." in report.advice
    log = EventAccumulator(str(tmp_path / "tb"))
    log.Reload()
    tags = log.Tags()
    assert "efficient/padding_report/batches" in tags["images"]
    assert {"efficient/padding_report/fill", "efficient/padding_report/batch_fill"} <= set(tags["scalars"])
    assert len(log.Scalars("efficient/padding_report/batch_fill")) == 12
    rows = (tmp_path / "csv" / "metrics.csv").read_text()
    assert "efficient/padding_report/wasted_flops" in rows


def test_floating_point_operations_of_padding(tmp_path: Path) -> None:
    """A linear layer on all tokens, 2 × 6 × 3 each, three times over for forward and backward; attention is none."""

    class Linear(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return (self.net(batch["x"]) * batch["attention_mask"][..., None]).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batches = DataLoader([{"x": torch.randn(4, 6), "attention_mask": m} for m in mask], 2)  # type: ignore[arg-type]
    trainer = fit(tmp_path, Linear(), batches, PaddingReport(d_model=1e9), max_epochs=1)
    assert float(trainer.callback_metrics["efficient/padding_report/wasted_flops"]) == pytest.approx(4 * 3 * 2 * 6 * 3)
    assert float(trainer.callback_metrics["efficient/padding_report/fill"]) == pytest.approx(0.5)


def test_a_step_that_takes_no_other_batch(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Tagger(), DataLoader(Texts(24), 4, collate_fn=collate), PaddingReport())
    assert float(trainer.callback_metrics["efficient/padding_report/fill"]) == pytest.approx(expected()[0], rel=1e-5)
