"""PRepBN in a Trainer: schedule, blend in validation, causal models, padding, composition, distribution."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from causal_models import W, hf
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import nn
from torch.utils.data import DataLoader
from zoo import CLASSES, Classifier, loader

from lightning_efficient import export, load_from_checkpoint
from lightning_efficient.callbacks.prepbn import PRepBN
from lightning_efficient.callbacks.sigma_reparam import SigmaReparam
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.norms.blend import blend_norms
from lightning_efficient.norms.swap import NormSwapConfig


def trainer(tmp_path: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, **quiet, **kwargs})


class Watch(Callback):
    """Keeps lam and phase of the first norm at every training step and validation batch."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.phases: list[str] = []
        self.validation: list[float] = []

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        norm = next(iter(blend_norms(pl_module).values()))
        self.train.append(float(norm.lam))
        self.phases.append(norm.phase)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.validation.append(float(next(iter(blend_norms(pl_module).values())).lam))


def test_lam_follows_the_step_and_validation_sees_the_blend(tmp_path: Any) -> None:
    watch = Watch()
    t = trainer(tmp_path, PRepBN(transition=4, hold=2), watch, num_sanity_val_steps=0, val_check_interval=2)
    module = Classifier("timm_vit")
    t.fit(module, loader(batches=8), loader(1))
    assert watch.train == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert watch.phases[-2:] == ["target", "target"]
    assert watch.validation == [1.0, 0.5, 0.0, 0.0]


def test_accumulation_moves_lam_with_optimizer_steps(tmp_path: Any) -> None:
    watch = Watch()
    t = trainer(tmp_path, PRepBN(transition=2, hold=1), watch, max_steps=4, accumulate_grad_batches=2)
    t.fit(Classifier("timm_vit"), loader(batches=8), loader(1))
    assert watch.train == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]


def test_a_causal_model_with_batch_statistics_is_refused_before_it_learns(tmp_path: Any) -> None:
    module = Classifier("decoder")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"causal.*target='affine'.*allow_causal=True"):
        trainer(tmp_path, PRepBN(transition=4, hold=0)).fit(module, loader(batches=8), loader(1))
    after = dict(module.named_parameters())
    assert all(torch.equal(before[k], after[k]) for k in before if k in after)
    trainer(tmp_path, PRepBN(transition=4, allow_causal=True)).fit(Classifier("decoder"), loader(batches=8), loader(1))


class Written(pl.LightningModule):
    """A causal net written out in the module itself; batches are dicts with labels and padding."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(12, 8), nn.LayerNorm(8), nn.Linear(8, 12)
        self.q, self.k, self.v, self.causal = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), causal
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls += 1
        ids, mask = batch["ids"][:, :-1], batch["mask"][:, None, :-1]
        h = self.norm(self.embed(ids))
        scores = self.q(h) @ self.k(h).mT + torch.where(mask > 0, 0.0, -1e9)
        if self.causal:
            scores = scores + torch.full_like(scores, -1e4).triu(1)
        h = h + scores.softmax(-1) @ self.v(h)
        return torch.nn.functional.cross_entropy(self.head(h).flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sentences() -> Any:
    ids = torch.randint(12, (8, 4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 0, 4:] = 0
    batches = [{"ids": i, "mask": m, "labels": i.masked_fill(m == 0, -100)} for i, m in zip(ids, mask, strict=True)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_a_causal_step_is_refused_by_what_it_does(tmp_path: Any) -> None:
    module = Written()
    with pytest.raises(ValueError, match=r"causal: the output of 'head' does not hear later positions of 'ids'"):
        trainer(tmp_path, PRepBN(transition=4, hold=0, recalibrate=0)).fit(module, sentences())
    assert module.calls == 0, "only a stand-in has run"
    trainer(tmp_path, PRepBN(transition=4)).fit(Written(causal=False), sentences())


def test_a_step_that_cannot_be_looked_at_is_said_to_be_unknown(tmp_path: Any) -> None:
    class Shy(Written):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if "log" in self.__dict__:
                raise RuntimeError("only in the loop")
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="whether the model is causal and .* could not be found out.*only in the loop"):
        trainer(tmp_path, PRepBN(transition=4, recalibrate=0)).fit(Shy(), sentences())


def test_a_model_without_norms_is_refused(tmp_path: Any) -> None:
    with pytest.raises(NoMatchError, match="no layer norm or RMS norm"):
        trainer(tmp_path, PRepBN()).fit(Classifier("cnn"), loader(), loader(1))


@pytest.mark.parametrize(
    ("kwargs", "options", "message"),
    [
        ({"transition": 9}, {}, "end at step"),
        ({"transition": 0.8}, {"max_steps": -1, "max_epochs": -1}, "run's length is unknown"),
        ({"transition": 1.5}, {}, "within"),
    ],
)
def test_a_transition_that_cannot_end_is_refused(tmp_path: Any, kwargs: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, PRepBN(**kwargs), **options).fit(Classifier("timm_vit"), loader(batches=8), loader(1))


def test_a_run_that_ends_half_way_says_so(tmp_path: Any) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    with pytest.warns(UserWarning, match=r"lam = 0\.5.*old norms are still needed"):
        trainer(tmp_path, PRepBN(transition=8, hold=0), Stop()).fit(
            Classifier("timm_vit"), loader(batches=8), loader(1)
        )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_with_sigma_reparam_in_either_order(tmp_path: Any, order: tuple[int, int]) -> None:
    def callbacks() -> list[Callback]:
        both: list[Callback] = [SigmaReparam(), PRepBN(transition=3, hold=1)]
        return [both[i] for i in order]

    whole = Classifier("timm_vit")
    t = trainer(tmp_path, *callbacks())
    t.fit(whole, loader(batches=8), loader(1))
    path = tmp_path / "a.ckpt"
    t.save_checkpoint(path)
    x = next(iter(loader()))[0]
    loaded = load_from_checkpoint(Classifier, path).eval()
    assert torch.equal(loaded(x), whole.eval()(x))
    plain = export(whole, x)
    assert not [m for m in plain.modules() if isinstance(m, nn.LayerNorm)]
    torch.testing.assert_close(plain(x), whole(x), rtol=0, atol=1e-5)

    # Stopped before the end of the transition and resumed: the same run.
    halfway = trainer(tmp_path, *callbacks(), max_steps=8, limit_train_batches=8)

    class Half(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    from lightning_efficient.testing.case import ResumableLoader

    halfway = trainer(tmp_path, *callbacks(), Half())
    halfway.fit(Classifier("timm_vit"), ResumableLoader(loader(batches=8)), loader(1))
    resumed = Classifier("timm_vit")
    t = trainer(tmp_path, *callbacks())
    t.fit(resumed, ResumableLoader(loader(batches=8)), loader(1), ckpt_path=tmp_path / "half.ckpt")
    for (name, a), b in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_padding_stays_out_of_the_statistics(tmp_path: Any) -> None:
    class Tokens(Classifier):
        """Gives its net the mask by keyword, as Hugging Face models do; padded tokens hold garbage."""

        def __init__(self, garbage: float) -> None:
            super().__init__("cnn")
            self.garbage = garbage
            torch.manual_seed(0)
            self.net = Masked()

        def forward(self, x: Any) -> Any:
            mask = torch.ones(len(x), 8, dtype=torch.long)
            mask[:, 5:] = 0
            tokens = x.squeeze(1).masked_fill(mask[:, :, None] == 0, self.garbage)
            return self.net(tokens, attention_mask=mask)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

        def forward(self, x: Any, attention_mask: Any) -> Any:
            h = self.norm(x) * attention_mask[:, :, None]
            return self.head(h.sum(1) / attention_mask.sum(1, keepdim=True))

    results = []
    for garbage in (0.0, 1e4):
        module = Tokens(garbage)
        trainer(tmp_path, PRepBN(transition=3, hold=1)).fit(module, loader(batches=8), loader(1))
        results.append(module.state_dict())
    a, b = results
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


class Translator(pl.LightningModule):
    """T5; sources are padded, targets of the same length are not."""

    def __init__(self, garbage: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.garbage = garbage
        make = hf("T5ForConditionalGeneration", "T5Config", dict, None, d_model=W, d_kv=8, num_heads=2, d_ff=32,
                  num_layers=1, decoder_start_token_id=0, dropout_rate=0.0)  # fmt: skip
        self.net = make()[0].train()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(
            input_ids=batch["ids"] * batch["mask"], attention_mask=batch["mask"], labels=batch["labels"]
        ).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_decoder_is_refused_and_padding_stays_out_of_the_encoder(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"in 4 of 9 norms \(net.decoder.*The other 5 norms are not concerned"):
        trainer(tmp_path, PRepBN(transition=4)).fit(Translator(0), sentences())
    states = []
    for garbage in (0, 7):
        module = Translator(garbage)
        trainer(tmp_path, PRepBN(transition=4, hold=0, exclude=["net.decoder"])).fit(module, sentences())
        states.append(module.net.encoder.block.state_dict())
    a, b = states
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


@pytest.mark.forks
def test_spawned_processes_are_refused_because_it_does_not_fold(tmp_path: Any) -> None:
    t = trainer(tmp_path, PRepBN(transition=3, hold=1), strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"norm_swap does not fold.*strategy='ddp'"):
        t.fit(Classifier("timm_vit"), loader(batches=8), loader(2))


def test_the_callback_can_be_used_again(tmp_path: Any) -> None:
    callback = PRepBN(transition=3, hold=1)
    module = Classifier("timm_vit")
    trainer(tmp_path, callback).fit(module, loader(batches=8), loader(1))
    expected = trainer(tmp_path, callback).test(module, loader(), verbose=False)
    watch = Watch()
    trainer(tmp_path, callback, watch, max_steps=5).fit(module, loader(batches=8), loader(1))
    assert watch.train == [0.0] * 5, "a finished swap must not start again"
    assert trainer(tmp_path, callback).test(module, loader(), verbose=False) != expected
    other, watch = Classifier("timm_vit"), Watch()
    trainer(tmp_path, callback, watch, max_steps=5).fit(other, loader(batches=8), loader(1))
    assert watch.train[0] == 1.0, "another model starts at the beginning"


def test_export_makes_the_norms_vanish(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = Classifier("timm_vit")
    trainer(tmp_path, PRepBN(transition=3, hold=1)).fit(module, loader(batches=8), loader(1))
    x = next(iter(loader()))[0]
    before = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    with caplog.at_level("INFO"):
        plain = export(module, x)
    assert "5 of 5 norms folded" in caplog.text
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items()), "the model itself must stay"
    kinds = {type(m).__name__ for n, m in plain.named_modules() if n.endswith(("norm", "norm1", "norm2"))}
    assert kinds == {"Identity"}
    torch.testing.assert_close(plain(x), module.eval()(x), rtol=0, atol=1e-5)
    unfolded = export(module, x, fold=False)
    torch.testing.assert_close(unfolded(x), plain(x), rtol=0, atol=1e-5)


# -- hyper-parameters --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*has no effect with target='un'")
@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_backbone_is_unfrozen_with_its_new_norms(tmp_path: Any, first: bool) -> None:
    class Headed(Classifier):
        def __init__(self) -> None:
            super().__init__("timm_vit")
            self.backbone, self.head = self.net.blocks, self.net.head

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Headed()
    ours, theirs = PRepBN(include=["net.blocks"], transition=4, hold=2), BackboneFinetuning(1, lambda epoch: 1.0)
    t = trainer(tmp_path, *((ours, theirs) if first else (theirs, ours)), max_steps=-1, max_epochs=3)
    t.fit(module, loader(batches=3), loader(1))
    stepped = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    for norm in blend_norms(module).values():
        assert all(p.requires_grad and id(p) in stepped for p in norm.target.parameters())
        assert not torch.equal(norm.target.bn.bias, norm.source.bias)


@pytest.mark.filterwarnings("ignore:.*has no effect with target")  # each target has its own
def test_every_hyper_parameter_of_the_method_is_an_argument(tmp_path: Any) -> None:
    arguments = inspect.signature(PRepBN).parameters
    for field in fields(NormSwapConfig):
        assert arguments[field.name].default == field.default, field.name
        assert field.name in str(PRepBN.__doc__)
    other: dict[str, Any] = {
        "target": "un", "init": "slab", "eps": 1e-3, "momentum": 0.3, "frozen": True, "decay": 0.8, "alpha": 0.1,
        "window": 3, "warmup": 5, "filtration": False, "learn_eta": False,
    }  # fmt: skip
    assert vars(PRepBN(**other).options) == other
    assert PRepBN(**other).config().items() >= other.items()
    parser = ArgumentParser()
    parser.add_class_arguments(PRepBN, "norm_swap")
    given = parser.instantiate_classes(parser.parse_string(yaml.safe_dump({"norm_swap": other})))
    assert vars(given.norm_swap.options) == other


def test_unified_normalization_in_a_run_shorter_than_its_warm_up_says_so(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"`warmup`=4000 training forwards, and this run has 8 steps.*such as 4"):
        trainer(tmp_path, PRepBN(target="un", transition=3)).fit(Classifier("timm_vit"), loader(batches=8), loader(1))
    module = Classifier("timm_vit")
    trainer(tmp_path, PRepBN(target="un", transition=3, warmup=4)).fit(module, loader(batches=8), loader(1))
    norm: Any = next(iter(blend_norms(module).values())).target
    assert int(norm.iterations) == 8 > norm.warmup


def test_eta_can_stay_where_it_is(tmp_path: Any) -> None:
    module = Classifier("timm_vit")
    trainer(tmp_path, PRepBN(transition=3, init="slab", learn_eta=False)).fit(module, loader(batches=8), loader(1))
    assert {float(norm.target.eta) for norm in blend_norms(module).values()} == {1.0}


def test_eta_is_frozen_for_fine_tuning(tmp_path: Any) -> None:
    t = trainer(tmp_path, PRepBN(transition=3))
    t.fit(Classifier("timm_vit"), loader(batches=8), loader(1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    module = load_from_checkpoint(Classifier, tmp_path / "a.ckpt")
    before = [norm.target.eta.clone() for norm in blend_norms(module).values()]
    gammas = [norm.target.bn.weight.clone() for norm in blend_norms(module).values()]
    means = [norm.target.bn.running_mean.clone() for norm in blend_norms(module).values()]
    callback = PRepBN(transition=3, learn_eta=False, frozen=True, recalibrate=0)
    trainer(tmp_path, callback).fit(module, loader(batches=8), loader(1))
    norms = list(blend_norms(module).values())
    assert all(torch.equal(norm.target.bn.running_mean, mean) for norm, mean in zip(norms, means, strict=True))
    assert all(torch.equal(norm.target.eta, eta) for norm, eta in zip(norms, before, strict=True))
    assert not any(torch.equal(norm.target.bn.weight, gamma) for norm, gamma in zip(norms, gammas, strict=True))
