"""FixedETFHead and AdaptiveGradientModulation in training: life cycle, resuming, processes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_efficient import (
    AdaptiveGradientModulation,
    FixedETFHead,
    export,
    load_from_checkpoint,
)
from lightning_efficient import functional as F
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.lifecycle.recipe import RecipeError


class Fusion(nn.Module):
    """Two halves of an image, with batch norm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.upper, self.lower = nn.Linear(32, 12), nn.Linear(32, 12)
        self.norm, self.drop = nn.BatchNorm1d(24), nn.Dropout(dropout)
        self.head = nn.Linear(24, 4)

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        both = torch.cat([self.upper(upper), self.lower(lower)], 1)
        return self.head(self.drop(self.norm(both)).tanh())  # type: ignore[no-any-return]


class Halves(LightningModule):
    def __init__(self, dropout: float = 0.0, where: str = "__init__") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Fusion(dropout)
        self.where = where
        self.late: Any = None

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.late = nn.Linear(24, 4)

    def configure_model(self) -> None:
        if self.where == "configure_model" and self.late is None:
            self.late = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        upper, lower = x.flatten(1).split(32, 1)
        return self.net(upper, lower=lower)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


def halves(dropout: float = 0.0, where: str = "__init__") -> Halves:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Halves(dropout, where)


def loader(batches: int = 6, size: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, 1, 8, 8, generator=generator, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.arange(batches * size) % 4), size)


def fit(root: Path, model: LightningModule, *callbacks: Any, **kwargs: Any) -> Trainer:
    ckpt = kwargs.pop("ckpt_path", None)
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, "logger": False} | kwargs
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), enable_progress_bar=False, default_root_dir=root,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(model, loader(), loader(1), ckpt_path=ckpt)
    return trainer


def etf(**kwargs: Any) -> FixedETFHead:
    return FixedETFHead(include=["net.head"], **{"sparsity": 0.5, "steps": 20, **kwargs})


def agm(**kwargs: Any) -> AdaptiveGradientModulation:
    return AdaptiveGradientModulation(**{"modalities": {"upper": 0, "lower": "lower"}, "module": "net", **kwargs})


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_the_head_stays_what_it_is_and_travels(tmp_path: Path) -> None:
    model = halves()
    trainer = fit(tmp_path, model, etf())
    expected = F.simplex_etf(24, 4, 0.5, steps=20).float()
    assert torch.equal(model.net.head.weight, expected)
    assert not model.net.head.bias.any()
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("net.head")}
    assert not torch.equal(model.net.upper.weight, halves().net.upper.weight)

    path = tmp_path / "head.ckpt"
    trainer.save_checkpoint(path)
    for load in (Halves.load_from_checkpoint, lambda p: load_from_checkpoint(Halves, p)):
        assert torch.equal(load(path).net.head.weight, expected)
    assert torch.equal(export(model, (loader().dataset[0][0][None],)).net.head.weight, expected)
    assert trainer.test(model, loader(), verbose=False) == Trainer(logger=False, accelerator="cpu").test(
        halves(), loader(), ckpt_path=path, verbose=False
    )


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_head_does_not_come_or_go_or_change_in_the_middle_of_a_run(tmp_path: Path) -> None:
    paths = {"with": tmp_path / "with.ckpt", "without": tmp_path / "without.ckpt"}
    fit(tmp_path, halves(), etf()).save_checkpoint(paths["with"])
    fit(tmp_path, halves()).save_checkpoint(paths["without"])
    for path, callback, said in (
        ("without", etf(), r"trained without FixedETFHead.*weights alone \(Halves.load_from_checkpoint"),
        ("with", etf(enabled=False), r"trained with FixedETFHead.*off \(enabled=False\)"),
        ("with", etf(sparsity=0.25), "`sparsity`: 0.5 then, 0.25 now"),
    ):
        with pytest.raises(RecipeError, match=said):
            fit(tmp_path, halves(), callback, max_epochs=2, ckpt_path=paths[path])
    fit(tmp_path, halves(), etf(enabled=False), max_epochs=2, ckpt_path=paths["without"])


def test_the_exact_frame_at_no_zeros(tmp_path: Path) -> None:
    model = halves()
    fit(tmp_path, model, etf(sparsity=0, bias="keep"))
    weight = model.net.head.weight.double()
    torch.testing.assert_close(weight @ weight.t(), (torch.eye(4).double() * 4 - 1) / 3, rtol=0, atol=1e-6)
    assert torch.equal(model.net.head.bias, halves().net.head.bias)


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_a_head_that_comes_too_late_is_named(where: str, tmp_path: Path) -> None:
    callback = FixedETFHead(include=["late"], steps=5)
    with pytest.raises(ValueError, match=r"\['late'\] was made or made trainable after.*Make it in `__init__`"):
        fit(tmp_path, halves(where=where), callback)

    class Fixed(Halves):
        def configure_model(self) -> None:
            if self.late is None:
                self.late = nn.Linear(24, 4)
                F.fix_head(self.late, 0.5, steps=5)

    model = Fixed(where="configure_model")
    fit(tmp_path, model, FixedETFHead(include=["late"], steps=5))
    assert int((model.late.weight == 0).sum()) == 48


def test_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(NoMatchError, match=r"name the head, include=\[...\]; the linear layers are"):
        fit(tmp_path, halves(), FixedETFHead())
    with pytest.raises(NoMatchError):
        fit(tmp_path, halves(), FixedETFHead(include=["net.norm"]))
    with pytest.raises(ValueError, match=r"`sparsity` is 1"):
        FixedETFHead(sparsity=1)
    with pytest.raises(ValueError, match=r"`bias` must be one of 'zero', 'keep'; got 'one'"):
        FixedETFHead(bias="one")  # type: ignore[arg-type]


def test_features_that_are_never_negative_are_warned_of_once(tmp_path: Path) -> None:
    class Behind(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.classify = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.classify(super().forward(x).relu())  # type: ignore[no-any-return]

    model = Behind()
    with pytest.warns(UserWarning, match=r"'classify' is given are never negative \(behind a ReLU\?\)") as caught:
        fit(tmp_path, model, FixedETFHead(include=["classify"], sparsity=0))
    assert len([w for w in caught if "never negative" in str(w.message)]) == 1
    assert not model.classify._forward_pre_hooks


# -- modulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alike_branches_and_no_strength_train_as_without(alpha: float, tmp_path: Path) -> None:
    """Dropout, batch norm and random numbers are those of a plain run, to the bit, although half is masked besides."""

    def trained(*callbacks: Any) -> tuple[dict[str, Tensor], Tensor]:
        model = halves(dropout=0.3)
        fit(tmp_path, model, *callbacks)
        return model.state_dict(), torch.get_rng_state()

    state, rng = trained()
    # with alpha 1, but only from an epoch on that does not come
    other, other_rng = trained(agm(alpha=alpha, start=0 if alpha == 0 else 5))
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert torch.equal(rng, other_rng)
    third, third_rng = trained(agm(alpha=2.0))
    assert torch.equal(rng, third_rng)
    assert not torch.equal(state["net.upper.weight"], third["net.upper.weight"])


def test_a_step_equals_the_method_written_out(tmp_path: Path) -> None:
    """Two steps of SGD without the callback: batch norm in training mode for the whole, in evaluation for the parts."""

    class Plain(Halves):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.5)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Plain()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin = Plain()
    logger = CSVLogger(tmp_path, "log", "")
    fit(tmp_path, model, agm(alpha=1.5), max_steps=2, max_epochs=-1, logger=logger)

    means = torch.zeros(2)
    for t, (x, y) in enumerate(list(loader())[:2], 1):
        upper, lower = x.flatten(1).split(32, 1)
        out = twin.net(upper, lower)
        twin.net.eval()
        a, v = twin.net(upper, torch.zeros_like(lower)), twin.net(torch.zeros_like(upper), lower)
        twin.net.train()
        responses = [(out - v + a) / 2, (out - a + v) / 2]
        s = torch.stack([nn.functional.cross_entropy(r, y) for r in responses]).detach()
        lead, usual = torch.exp(s.flip(0) - s), torch.exp(means.flip(0) - means)
        k = torch.exp(1.5 * (usual - lead))
        means = means * (t - 1) / t + s / t
        z = k[0] * responses[0] + k[1] * responses[1]
        twin.zero_grad()
        nn.functional.cross_entropy(out.detach() + z - z.detach(), y).backward()
        with torch.no_grad():
            for p in twin.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert "efficient/adaptive_gradient_modulation/factor/upper" in (tmp_path / "log" / "metrics.csv").read_text()


def test_arguments_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`modalities` is None; expected from 2 to 4"):
        AdaptiveGradientModulation()
    with pytest.raises(ValueError, match=r"`alpha` is -1"):
        agm(alpha=-1)
    with pytest.raises(ValueError, match=r"`module` 'nett' is none; near names: \['net'"):
        fit(tmp_path, halves(), agm(module="nett"))
    with pytest.raises(ValueError, match=r"the step did not call 'Halves' with the tensors"):
        fit(tmp_path, halves(), agm(module=None))
    with pytest.raises(ValueError, match=r"`target` is 'y'; expected the name of the classes in the batch, which has"):
        fit(tmp_path, halves(), agm(target="y"))

    class Sequence(Halves):
        def forward(self, x: Tensor) -> Tensor:
            upper, lower = x.flatten(1).split(32, 1)
            return self.seq(upper, lower)[:, 0]  # type: ignore[no-any-return]

        def __init__(self) -> None:
            super().__init__()
            self.seq = nn.Bilinear(32, 32, 8)
            self.seq.forward = lambda a, b: torch.zeros(len(a), 2, 4, requires_grad=True)  # type: ignore[method-assign]

    with pytest.raises(ValueError, match=r"the network returns \(8, 2, 4\); expected \(samples, classes\)"):
        fit(tmp_path, Sequence(), agm(module="seq", modalities={"upper": 0, "lower": 1}))


def test_a_file_of_other_modalities_is_refused(tmp_path: Path) -> None:
    trainer = fit(tmp_path, halves(), agm())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    three = agm(modalities={"a": 0, "b": 1, "c": 2})
    with pytest.raises(RecipeError, match=r"`modalities`: {'upper': 0, 'lower': 'lower'} then, {'a': 0, .* now"):
        fit(tmp_path, halves(), three, max_epochs=2, ckpt_path=tmp_path / "two.ckpt")
