"""TempScale in a Trainer: where the temperature lives in training, and how it comes and goes without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from zoo import CLASSES, Classifier, loader

from lightning_efficient import SigmaReparam, TempScale
from lightning_efficient.attention.temperature import apply_temp_scale
from lightning_efficient.common.match import NoMatchError
from lightning_efficient.testing.case import ResumableLoader

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")


def trainer(tmp_path: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_steps": 6, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, "num_sanity_val_steps": 0, **quiet, **kwargs})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Over(nn.Module):
    """Divides some rows by a temperature, with autograd: what the boundary must be equal to."""

    def __init__(self, log_tau: nn.Parameter, rows: int) -> None:
        super().__init__()
        self.log_tau, self.rows = log_tau, rows

    def forward(self, weight: Tensor) -> Tensor:
        factor = torch.exp(-self.log_tau)
        return torch.cat([weight[: self.rows] * factor, weight[self.rows :]])


# -- in training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [False, True])
def test_training_is_that_of_an_autograd_parametrization(tmp_path: Any, learnable: bool) -> None:
    """Float64, AdamW with weight decay: the same losses, weights and temperatures."""
    module = Classifier("timm_vit").double()
    swap = TempScale(tau=0.6, learnable=learnable)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    t = trainer(tmp_path, swap, Losses(), precision="64-true", max_steps=20)
    data = loader(20, dtype=torch.float64)
    t.fit(module, data, loader(1, dtype=torch.float64))

    reference: Any = Classifier("timm_vit").double()
    taus = []
    for block in reference.net.blocks:
        log_tau = nn.Parameter(torch.tensor([0.6], dtype=torch.float64).log(), requires_grad=learnable)
        taus.append(log_tau)
        for name in ("weight", "bias"):
            parametrize.register_parametrization(block.attn.qkv, name, Over(log_tau, 24))
    shared = {id(p) for p in taus}
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in reference.parameters() if p.ndim <= 1 and id(p) not in shared], "weight_decay": 0.0},
    ] + ([{"params": taus, "weight_decay": 0.0}] if learnable else [])
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    expected = []
    for x, y in data:
        loss = F.cross_entropy(reference(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, abs=1e-11)
    assert len(set(losses)) == 20
    net: Any = module.net
    for block, other in zip(net.blocks, reference.net.blocks, strict=True):
        torch.testing.assert_close(block.attn.qkv.weight, other.attn.qkv.weight, rtol=0, atol=1e-11)
        torch.testing.assert_close(block.attn.qkv.bias, other.attn.qkv.bias, rtol=0, atol=1e-11)
    if learnable:
        assert all(abs(float(tau.detach().exp()) - 0.6) > 1e-3 for tau in taus), "it has learned something"


@pytest.mark.filterwarnings("ignore:TempScale changes nothing")
def test_one_changes_no_bit(tmp_path: Any) -> None:
    """Nor does looking at a batch move the random numbers or the order of a shuffled loader."""
    results = []
    for callbacks in ([], [TempScale(tau=1.0)]):
        torch.manual_seed(3)
        module = Classifier("timm_vit")
        data = DataLoader(loader(6).dataset, 4, shuffle=True)
        trainer(tmp_path, *callbacks, max_steps=-1, max_epochs=2).fit(module, data, loader(1))
        results.append((weights(module), torch.rand(3)))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.filterwarnings("ignore:TempScale changes nothing")
def test_one_goes_on(tmp_path: Any) -> None:
    """A run goes on from its files, and evaluation takes it as it is; a model without attention is refused as ever."""
    module = Classifier("timm_vit")
    t = trainer(tmp_path, TempScale(), limit_val_batches=0)
    t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Classifier("timm_vit")
    trainer(tmp_path, TempScale(), max_steps=t.global_step + 2).fit(
        resumed, loader(6), loader(1), ckpt_path=tmp_path / "one.ckpt"
    )
    expected = trainer(tmp_path).test(resumed, loader(2), verbose=False)
    assert trainer(tmp_path, TempScale()).test(resumed, loader(2), verbose=False) == expected
    fresh = Classifier("timm_vit")
    assert trainer(tmp_path, TempScale()).test(fresh, loader(2), verbose=False)
    with pytest.raises(NoMatchError):
        trainer(tmp_path, TempScale()).fit(Classifier("cnn"), loader(6), loader(1))


def test_the_file_holds_it_and_loads_without_us(tmp_path: Any) -> None:
    module = Classifier("timm_vit")
    t = trainer(tmp_path, TempScale(tau=0.5))
    t.fit(module, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "whole.ckpt")
    stock = Classifier.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert same(weights(stock), weights(module))
    # Tested with the callback or without, from the file or from memory, the temperature is there once.
    expected = trainer(tmp_path).test(stock, loader(2), verbose=False)
    for model, options in (
        (Classifier("timm_vit"), {"ckpt_path": tmp_path / "whole.ckpt"}),
        (module, {}),
    ):
        assert trainer(tmp_path, TempScale(tau=0.5)).test(model, loader(2), verbose=False, **options) == expected
    with pytest.warns(UserWarning, match=r"holds the temperature.*`tau`: 0.5 then, 0.9 now"):
        found = trainer(tmp_path, TempScale(tau=0.9)).test(module, loader(2), verbose=False)
    assert found == expected


def test_another_one_does_not_train_what_holds_a_temperature(tmp_path: Any) -> None:
    module, mine = Classifier("timm_vit"), TempScale(tau=0.5)
    trainer(tmp_path, mine).fit(module, loader(6), loader(1))
    before = weights(module)
    with pytest.raises(ValueError, match=r"another TempScale.*a second one would multiply it.*`tau`: 0.5 then, 0.25"):
        trainer(tmp_path, TempScale(tau=0.25)).fit(module, loader(6), loader(1))
    assert same(before, weights(module))
    for other in (mine, TempScale(tau=0.5)):
        t = trainer(tmp_path, other, max_steps=0)
        t.fit(module, loader(6), loader(1))
        assert same(before, weights(module)), "one with the same arguments goes on"


def test_a_transition_ends_at_tau(tmp_path: Any) -> None:
    seen = []

    class Taus(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["efficient/temp_scale/tau_mean"]))

    t = trainer(tmp_path, TempScale(tau=0.25, transition=0.5), Taus(), max_steps=-1, max_epochs=1, log_every_n_steps=1)
    t.fit(Classifier("timm_vit"), loader(8), loader(1))
    assert seen == pytest.approx([0.25 ** min(1.0, (i + 1) / 4) for i in range(8)])


def test_a_resumed_transition_in_the_middle_of_an_epoch(tmp_path: Any) -> None:
    class Half(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def run(*more: Callback, **options: Any) -> dict[str, Tensor]:
        module = Classifier("timm_vit")
        t = trainer(tmp_path, TempScale(tau=0.3, transition=5), *more, max_steps=-1, max_epochs=1)
        t.fit(module, ResumableLoader(loader(8)), loader(1), **options)
        return weights(module)

    whole = run(Half())
    assert same(whole, run(ckpt_path=tmp_path / "half.ckpt"))


def test_a_resumed_run_of_another_length_keeps_its_transition(tmp_path: Any) -> None:
    seen: list[float] = []

    class Taus(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["efficient/temp_scale/tau_mean"]))

    for epochs in (1, 2):
        path = tmp_path / "end.ckpt" if epochs == 2 else None
        options = {"max_steps": -1, "max_epochs": epochs, "log_every_n_steps": 1}
        t = trainer(tmp_path, TempScale(tau=0.25, transition=0.5), Taus(), **options)
        t.fit(Classifier("timm_vit"), loader(8), loader(1), ckpt_path=path)
        t.save_checkpoint(tmp_path / "end.ckpt")
    assert seen[7:] == pytest.approx([0.25] * 9)
    module, mine = Classifier("timm_vit"), TempScale(tau=0.25, transition=0.5)
    seen.clear()
    for epochs in (1, 3):  # so does the same callback in a further, longer fit
        trainer(tmp_path, mine, Taus(), max_steps=-1, max_epochs=epochs, log_every_n_steps=1).fit(
            module, loader(8), loader(1)
        )
    assert seen[7:] == pytest.approx([0.25] * 25)


# -- without -----------------------------------------------------------------------------------------------------------


class Capped(nn.Module):
    """Soft-capped logits: no weight scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        logits = 2 * torch.tanh(self.q(x) @ self.k(x).transpose(1, 2) / 8)
        return self.head((logits.softmax(-1) @ self.v(x)).mean(1))


class WithCapped(Classifier):
    def __init__(self) -> None:
        super().__init__("cnn")
        torch.manual_seed(0)
        self.net = Capped()


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_evaluation_puts_it_on_and_takes_it_off(tmp_path: Any, run: str) -> None:
    class Predicts(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0])

    def result(module: Any, *callbacks: Callback) -> Any:
        t = trainer(tmp_path, *callbacks)
        if run == "predict":
            return torch.cat(t.predict(module, loader(2)))
        (metrics,) = getattr(t, run)(module, loader(2), verbose=False)
        return torch.tensor(list(metrics.values()))

    for name in ("timm_vit", "encoder", "bert"):
        module, scaled = Predicts(name), Predicts(name)
        before = weights(module)
        found = result(module, TempScale(tau=0.4))
        assert same(before, weights(module))
        assert not torch.equal(found, result(module))
        apply_temp_scale(scaled.net, 0.4, example=next(iter(loader()))[0])
        torch.testing.assert_close(found, result(scaled), rtol=1e-6, atol=1e-6)


def test_what_no_weight_scales_is_adapted(tmp_path: Any) -> None:
    module = WithCapped()
    plain = trainer(tmp_path).test(module, loader(2), verbose=False)
    found = trainer(tmp_path, TempScale(tau=0.1)).test(module, loader(2), verbose=False)
    assert found != plain
    net: Any = module.net

    def sharper(x: Tensor) -> Tensor:
        x = x.squeeze(1)
        logits = 2 * torch.tanh(net.q(x) @ net.k(x).transpose(1, 2) / 8) / 0.1
        return net.head((logits.softmax(-1) @ net.v(x)).mean(1))

    losses = [F.cross_entropy(sharper(x), y) for x, y in loader(2)]
    assert found[0]["test_loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    assert trainer(tmp_path).test(module, loader(2), verbose=False) == plain, "the adapter is gone"


def test_length_aware_modes(tmp_path: Any) -> None:
    module = Classifier("decoder")
    before = weights(module)
    plain = trainer(tmp_path).test(module, loader(2), verbose=False)
    for callback in (TempScale(mode="log_n", length=4), TempScale(mode="ssmax")):
        assert trainer(tmp_path, callback).test(module, loader(2), verbose=False) != plain
    assert trainer(tmp_path).test(module, loader(2), verbose=False) == plain
    assert same(before, weights(module))


def test_an_error_in_the_middle_gives_the_weights_back(tmp_path: Any) -> None:
    class Fails(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            super().test_step(batch, batch_idx)
            if batch_idx == 1:
                raise RuntimeError("in the middle")

    module = Fails("timm_vit")
    before = weights(module)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer(tmp_path, TempScale(tau=0.5)).test(module, loader(2), verbose=False)
    assert same(before, weights(module))


def test_disabled_does_nothing(tmp_path: Any) -> None:
    module = Classifier("timm_vit")
    plain = trainer(tmp_path).test(module, loader(2), verbose=False)
    assert trainer(tmp_path, TempScale(enabled=False, tau=0.5)).test(module, loader(2), verbose=False) == plain


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "TempScale.`tau`. is 0.0; expected finite numbers above 0"),
        ({"tau": float("nan")}, "got nan"),
        ({"tau": [0.5, -1.0]}, "is -1.0"),
        ({"mode": "log"}, "one of 'constant', 'log_n', 'ssmax'; got 'log'"),
        ({"per_head": True}, "add `learnable=True`"),
        ({"learnable": True, "transition": 0.5}, "would overwrite"),
    ],
)
def test_bad_arguments(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TempScale(**options)


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        ("timm_vit", {"tau": [0.5]}, ValueError, r"holds 1 temperatures for 2 attentions"),
        ("cnn", {"tau": 0.5}, NoMatchError, "no attention was seen"),
        ("timm_vit", {"tau": 0.5, "include": ["net.block.*"]}, NoMatchError, "matches no attention"),
    ],
)
def test_bad_targets_change_nothing(tmp_path: Any, net: str, options: Any, error: type, message: str) -> None:
    module = Classifier(net)
    before = weights(module)
    for run in ("fit", "test"):
        t = trainer(tmp_path, TempScale(**options))
        with pytest.raises(error, match=message):
            t.fit(module, loader(6), loader(1)) if run == "fit" else t.test(module, loader(2), verbose=False)
        assert same(before, weights(module))


def test_frozen_queries_get_an_adapter_in_training(tmp_path: Any) -> None:
    class Frozen(Classifier):
        def __init__(self) -> None:
            super().__init__("timm_vit")
            self.net.blocks[0].attn.qkv.weight.requires_grad_(False)

    module, callback = Frozen(), TempScale(tau=0.5)
    frozen = module.net.blocks[0].attn.qkv.weight.detach().clone()
    trainer(tmp_path, callback).fit(module, loader(6), loader(1))
    assert callback.change is not None
    assert "adapter ('net.blocks.0.attn.qkv.weight' is in no optimizer)" in callback.change.targets["net.blocks.0.attn"]
    assert callback.change.targets["net.blocks.1.attn"] == "tau = 0.5, in qkv.weight, qkv.bias"
    assert torch.equal(module.net.blocks[0].attn.qkv.weight, frozen)
    assert trainer(tmp_path, TempScale(tau=0.5)).test(Frozen(), loader(2), verbose=False)


def test_a_list_goes_by_the_order_of_the_forward(tmp_path: Any) -> None:
    module, first = Classifier("timm_vit"), {}

    class First(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                first.update(weights(pl_module))

    before = weights(module)
    trainer(tmp_path, TempScale(tau=[0.5, 4.0]), First()).fit(module, loader(6), loader(1))
    for i, tau in enumerate((0.5, 4.0)):
        name = f"net.blocks.{i}.attn.qkv.weight"
        torch.testing.assert_close(first[name][:24] * tau, before[name][:24], rtol=1e-6, atol=0)
        assert torch.equal(first[name][24:], before[name][24:])


@pytest.mark.parametrize("run", ["fit", "test"])
def test_twice_in_one_trainer(tmp_path: Any, run: str) -> None:
    module = Classifier("timm_vit")
    before = weights(module)
    both = TempScale(tau=0.5, include=["net.blocks.0.*"]), TempScale(tau=0.8, include=["net.blocks.1.*"])
    t = trainer(tmp_path, *both)
    with pytest.raises(ValueError, match=r"more than one TempScale is enabled.*tau=\[...\]"):
        t.fit(module, loader(6), loader(1)) if run == "fit" else t.test(module, loader(1), verbose=False)
    assert same(before, weights(module))
    both[1].enabled = False
    t = trainer(tmp_path, *both)
    t.fit(module, loader(6), loader(1)) if run == "fit" else t.test(module, loader(1), verbose=False)


@pytest.mark.parametrize("run", ["fit", "test"])
def test_quantized_weights_are_refused(tmp_path: Any, run: str) -> None:
    class Quantized(Classifier):
        def __init__(self) -> None:
            super().__init__("timm_vit")
            self.net.blocks[0].attn.qkv.weight.requires_grad_(False)
            self.net.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)

    module = Quantized()
    before = weights(module)
    t = trainer(tmp_path, TempScale(tau=0.5))
    with pytest.raises(ValueError, match=r"'net.codes' is quantized \(torch.int8.*then quantize"):
        t.fit(module, loader(6), loader(1)) if run == "fit" else t.test(module, loader(1), verbose=False)
    assert same(before, weights(module))


@pytest.mark.parametrize("net", ["timm_vit", "capped"])
def test_with_sigma_reparam_on_the_same_queries_in_either_order(tmp_path: Any, net: str) -> None:
    """Both lists train the same network, which is neither method's alone."""
    results = []
    for make in (
        lambda: [TempScale(tau=0.6, learnable=True), SigmaReparam()],
        lambda: [SigmaReparam(), TempScale(tau=0.6, learnable=True)],
        lambda: [SigmaReparam()],
        lambda: [TempScale(tau=0.6, learnable=True)],
    ):
        module = Classifier(net)
        trainer(tmp_path, *make()).fit(module, loader(6), loader(1))
        results.append(weights(module))
    assert same(results[0], results[1])
    name = "net.head.weight"
    assert not any(torch.allclose(results[0][name], other[name]) for other in results[2:])
