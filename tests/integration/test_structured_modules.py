"""Groups of LightningModules as tutorials write them are those of everything their steps compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import HESSOPruning, MagnitudePruning, export, load_from_checkpoint
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.structured.graph import find_groups
from lightning_efficient.structured.groups import Groups


class Base(LightningModule):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Layers(Base):
    """Layers directly on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_1, self.layer_2, self.layer_3 = nn.Linear(12, 16), nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_3(self.layer_2(self.layer_1(x).relu()).relu())


class Parts(Base):
    """A backbone and a head, called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU())
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(1))


class Coder(nn.Module):
    """An encoder and a decoder behind methods of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.code = nn.Linear(12, 16), nn.Linear(16, 8)
        self.up, self.out = nn.Linear(8, 14), nn.Linear(14, 12)

    def encode(self, x: Tensor) -> Tensor:
        return self.code(self.down(x).relu())

    def decode(self, z: Tensor) -> Tensor:
        return self.out(self.up(z).relu())


class Methods(Base):
    """Never calls its network, only methods of it; training reads a head that forward does not."""

    def __init__(self) -> None:
        super().__init__()
        self.vae, self.classify = Coder(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.vae.decode(self.vae.encode(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        code = self.vae.encode(batch[0])
        return F.mse_loss(self.vae.decode(code), batch[0]) + F.cross_entropy(self.classify(code), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[0]))


class Whole(Methods):
    """What its steps compute, as one forward: what ``find_groups`` is to be asked about."""

    def forward(self, x: Tensor) -> Any:
        code = self.vae.encode(x)
        return self.vae.decode(code), self.classify(code)


def _data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 12, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Layers, {"layer_1", "layer_2"}),
        (Parts, {"backbone.0", "backbone.2"}),
        (Methods, {"vae.down", "vae.code", "vae.up"}),
    ],
)
def test_hesso_prunes_what_the_whole_step_allows(kind: type[Base], names: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(5, 12)
    expected = _entries(find_groups(Whole() if kind is Methods else model, x))
    assert set(expected) == names
    hesso = HESSOPruning(target=0.5, start=0.1, duration=0.5, periods=2)
    trainer = Trainer(
        max_epochs=4, callbacks=[hesso], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, _data(), _data())
    assert _entries(hesso.groups) == expected
    small = export(model, x)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    again = load_from_checkpoint(kind, path).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def _entries(groups: Groups) -> dict[str, set[Any]]:
    """Which entries of which tensors are which unit."""
    return {
        name: {(s.name, s.dim, s.role, tuple(map(tuple, s.index.tolist()))) for s in group.slices}
        for name, group in groups.found.items()
    }


def test_what_stays_is_a_multiple_of_round_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, hesso = Layers(), HESSOPruning(target=0.3, start=0.1, duration=0.5, periods=2, round_to=4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=4, callbacks=[hesso], enable_model_summary=False, accelerator="cpu", **options).fit(
        model, _data(), _data()
    )
    small = export(model, torch.randn(2, 12))
    widths = [small.layer_1.out_features, small.layer_2.out_features]  # type: ignore[union-attr]
    assert all(width % 4 == 0 for width in widths)  # type: ignore[operator]
    assert widths != [16, 20]


class Sizes:
    """What a module goes by, held beside it."""

    def __init__(self) -> None:
        self.n_head = 4


class Held(Base):
    """Heads are counted by an object that the module holds, and parts of a projection by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.parts = Sizes(), [8, 4, 4]
        self.qkv, self.proj = nn.Linear(4, 48), nn.Linear(16, 12)
        self.expand, self.head = nn.Linear(12, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 3, 4)).view(len(x), 3, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        gate, left, right = self.expand(self.proj(y).mean(1)).split(self.parts, -1)
        return self.head(gate.relu() * torch.cat([left, right], -1))


def test_numbers_held_beside_a_module_come_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Held(), torch.randn(5, 12)
    hesso = HESSOPruning(target=0.75, start=0.1, duration=0.5, periods=2)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=4, callbacks=[hesso], enable_model_summary=False, accelerator="cpu", **options)
    trainer.fit(model, _data(), _data())
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    small = export(load_from_checkpoint(Held, path), x)
    assert small.config.n_head < 4  # type: ignore[union-attr]
    assert sum(small.parts) < 16  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5)


class InTraining(Base):
    """A network that returns a second output in training mode, which the training step takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 14)
        self.head, self.deep = nn.Linear(14, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.one(x).relu()
        y = self.head(self.two(h).relu())
        return (y, self.deep(h)) if self.training else y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        y, deep = self(batch[0])
        return F.cross_entropy(y, batch[1]) + F.cross_entropy(deep, batch[1])


class TwoOptimizers(LightningModule):
    """Steps by itself, and returns and logs nothing; only its losses read some of its widths."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
        self.features = nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 10), nn.Sigmoid(), nn.Linear(10, 9))
        self.judge = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maker(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        def score(x: Tensor) -> Tensor:
            return self.judge(self.features(x).relu()).tanh().mean()

        losses = (lambda: -score(self(batch[0])), lambda: score(self(batch[0]).detach()) - score(batch[0]))
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        judging = [*self.features.parameters(), *self.judge.parameters()]
        return [torch.optim.Adam(params, 1e-3) for params in (self.maker.parameters(), judging)]


class Decayed(Layers):
    """Weight decay in the loss, and norms of weights and shares of dead units in the logs."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        hidden = self.layer_1(batch[0]).relu()
        self.log("dead", (hidden == 0).float().mean())
        loss = F.cross_entropy(self(batch[0]), batch[1])
        decay = torch.zeros(())
        for parameter in self.parameters():
            decay = decay + parameter.norm() ** 2
        self.log("train_loss", loss + 1e-3 * decay)
        return {"loss": loss + 1e-3 * decay}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("norm", self.layer_2.weight.norm())


class Bare(Base):
    """Parameters of its own and no network; a weight that is used both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.shift, self.out = (nn.Parameter(torch.randn(*s) * 0.3) for s in ((14, 12), (14,), (3, 12)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.down, self.shift).relu(), self.down.T).relu(), self.out)


def test_cycles_probe_a_step_that_runs_in_training_mode_only() -> None:
    torch.manual_seed(0)
    model, hesso = InTraining(), HESSOPruning(target=0.5, start=0.1, duration=0.5, periods=2, cric=True)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=3, callbacks=[hesso], enable_model_summary=False, accelerator="cpu", **options).fit(
        model, _data(), _data()
    )
    assert model.training
    small = export(model, torch.randn(5, 12))
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (InTraining, {"one", "two"}), (TwoOptimizers, {"maker.0", "features.0", "features.4"}),
        (Decayed, {"layer_1", "layer_2"}), (Bare, {"down"}),
    ],
)  # fmt: skip
def test_steps_that_do_more_than_return_a_loss(kind: type[LightningModule], names: set[str]) -> None:
    torch.manual_seed(0)
    model, hesso = kind(), HESSOPruning(target=0.5, start=0.1, duration=0.5, periods=2)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = (_data(),) if kind is TwoOptimizers else (_data(), _data())
    trainer = Trainer(max_epochs=3, callbacks=[hesso], enable_model_summary=False, accelerator="cpu", **options)
    trainer.fit(model, *data)
    assert set(hesso.groups.found) == names
    assert any("only training" in note for note in hesso.groups.notes) == (kind is InTraining)
    small = export(model, x := torch.randn(5, 12))
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x), model.eval()(x), rtol=0, atol=1e-5)


class Followed(Layers):
    """A copy that training takes over from time to time, such as a target network."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 20), nn.Linear(20, 3)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        for mine, theirs in zip((self.layer_1, self.layer_2, self.layer_3), self.target, strict=True):
            theirs.load_state_dict(mine.state_dict())
        first, second, third = self.target
        return F.mse_loss(self(batch[0]), third(second(first(batch[0]).relu()).relu()).detach() + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for n, p in self.named_parameters() if "target" not in n], 1e-2)


def test_widths_that_hang_on_what_nothing_trains_are_an_error() -> None:
    hesso = HESSOPruning(target=0.3, start=0.1, duration=0.5, periods=2)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, callbacks=[hesso], enable_model_summary=False, accelerator="cpu", **options)
    with pytest.raises(NoMatchError, match=r"nothing that is trained .*: target\.0\.weight is in no optimizer"):
        trainer.fit(Followed(), _data(), _data())


class Words(Layers):
    """The first layer is a table whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 12, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table((x[:, 0].abs() * 3).long().clamp(max=8)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


class Unborn(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.layer_2 = nn.LazyLinear(20)


def test_sparse_gradients_and_weights_without_values_are_told() -> None:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    hesso = HESSOPruning(target=0.3, start=0.1, duration=0.5, periods=2)
    Trainer(callbacks=[hesso], **options).fit(Words(), _data(), _data())
    assert "gradients are sparse" in hesso.groups.refused["table"]
    assert set(hesso.groups.found) == {"layer_1", "layer_2"}
    masks = MagnitudePruning(amount=0.5, embeddings=True)
    with pytest.warns(UserWarning, match=r"leaves 1 weight.*table.weight \(its gradients are sparse"):
        Trainer(callbacks=[masks], **options).fit(Words(), _data(), _data())
    for method in (HESSOPruning(), MagnitudePruning()):
        with pytest.raises(ValueError, match=r"'layer_2.weight' has no values yet.*Run one batch"):
            Trainer(callbacks=[method], **options).fit(Unborn(), _data(), _data())
