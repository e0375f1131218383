"""TempScale in training where no weight can hold the temperature: forward adapters, and what their files do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forking import forked
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import Classifier, loader

from lightning_efficient import TempScale, export, load_from_checkpoint
from lightning_efficient.attention.adapter import installed
from lightning_efficient.attention.temperature import TempScaleError, apply_temp_scale
from lightning_efficient.common.comparing import ExportError
from lightning_efficient.testing.checks import assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
SCRIPT = Path(__file__).parent / "scripts" / "temp_scale_ddp.py"
KEY = "net.attn.temp_scale.constant.tau"


def trainer(tmp_path: Any, *callbacks: Callback, **kwargs: Any) -> Trainer:
    options = {"max_steps": 6, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**options, "num_sanity_val_steps": 0, **quiet, **kwargs})


def metrics(tmp_path: Any, module: Any, *callbacks: Callback, **options: Any) -> Any:
    return trainer(tmp_path, *callbacks).test(module, loader(2), verbose=False, **options)


def capped(freeze: tuple[str, ...] = ()) -> Classifier:
    module = Classifier("capped")
    for name in freeze:
        module.net.get_submodule(name).requires_grad_(False)
    return module


def fitted(tmp_path: Any, **options: Any) -> tuple[Classifier, Trainer]:
    module, t = capped(), trainer(tmp_path, TempScale(**options))
    t.fit(module, loader(6), loader(1))
    return module, t


# -- training ----------------------------------------------------------------------------------------------------------


def taus_by_hand(steps: int) -> list[float]:
    return [0.4 ** min(1.0, step / 3) for step in range(steps)]


@pytest.mark.parametrize("how", ["constant", "learnable", "per_head", "transition"])
@pytest.mark.parametrize("freeze", [(), ("attn.qkv",)])
def test_training_is_that_of_a_model_that_divides_by_tau(tmp_path: Any, how: str, freeze: tuple[str, ...]) -> None:
    """Float64, AdamW with decay, a schedule: losses, weights and temperatures of a hand-written reference."""
    module, losses = capped(freeze).double(), []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    options = {"constant": {}, "transition": {"transition": 3}}.get(how, {"learnable": True})
    callback = TempScale(tau=0.4, include=["net.attn"], per_head=how == "per_head", **options)
    data = loader(12, dtype=torch.float64)
    t = trainer(tmp_path, callback, Losses(), precision="64-true", max_steps=12)
    t.fit(module, data, loader(1, dtype=torch.float64))

    reference: Any = capped(freeze).double()
    learns = how in ("learnable", "per_head")
    log_tau = torch.full((2 if how == "per_head" else 1, 1, 1), 0.4, dtype=torch.float64).log().requires_grad_(learns)
    params = [p for p in reference.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        *([{"params": [log_tau], "weight_decay": 0.0}] if learns else []),
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    expected = []
    for step, (x, y) in enumerate(data):
        tau = torch.tensor(taus_by_hand(12)[step], dtype=torch.float64) if how == "transition" else log_tau.exp()
        loss = F.cross_entropy(reference.net(x, tau), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, abs=1e-10)
    for (name, p), (_, q) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)
    law: Any = installed(module.net.attn)
    if learns:
        assert law.law.log_tau.tolist() == pytest.approx(log_tau.flatten().tolist(), abs=1e-10)
        assert abs(float(log_tau.detach().exp()[0]) - 0.4) > 1e-5, "it has learned something"


class Probed(Classifier):
    """A frozen encoder under a head that learns: its temperature cannot go into weights that no optimizer steps."""

    def __init__(self) -> None:
        super().__init__("encoder")
        self.net.requires_grad_(False)
        last = [m for m in self.net.modules() if isinstance(m, nn.Linear)][-1]
        last.requires_grad_(True)


@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"transition": 3}])
def test_the_exported_weights_hold_what_training_left_to_adapters(tmp_path: Any, options: dict[str, Any]) -> None:
    module = Probed()
    trainer(tmp_path, TempScale(tau=0.6, **options)).fit(module, loader(6), loader(1))
    adapted = [name for name, part in module.named_modules() if installed(part)]
    assert adapted
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = next(iter(loader(1)))[0]
    module.eval()
    plain = export(module, x)
    torch.testing.assert_close(plain(x), module(x), rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(part) for part in plain.modules())
    assert {name for name, p in plain.named_parameters() if not torch.equal(p, module.get_parameter(name))}
    assert_equal(module.state_dict(), before)
    assert [name for name, part in module.named_modules() if installed(part)] == adapted


def test_what_no_weights_hold_is_not_exported(tmp_path: Any) -> None:
    module = Probed()
    trainer(tmp_path, TempScale(mode="log_n", length=64)).fit(module, loader(6), loader(1))
    with pytest.raises(ExportError, match=r"no weights hold the attention temperature of .*'log_n'.*torch.export"):
        export(module, next(iter(loader(1)))[0])


def test_one_changes_no_bit_and_puts_nothing_on(tmp_path: Any) -> None:
    plain, module = capped(), capped()
    trainer(tmp_path).fit(plain, loader(6), loader(1))
    with pytest.warns(UserWarning, match="TempScale changes nothing"):
        trainer(tmp_path, TempScale(tau=1.0)).fit(module, loader(6), loader(1))
    assert_equal(module.state_dict(), plain.state_dict())
    assert not any(installed(m) for m in module.modules())


def test_the_modes_by_length_train(tmp_path: Any) -> None:
    """Softmax(log n / τ · logits): from the definition, with n the same in every row."""
    module, _ = fitted(tmp_path, mode="ssmax", include=["net.attn"], learnable=True)
    assert set(module.state_dict()) - set(capped().state_dict()) == {"net.attn.temp_scale.ssmax.log_tau"}
    law: Any = installed(module.net.attn)
    x = next(iter(loader()))[0]
    by_hand: Any = capped()
    by_hand.load_state_dict({k: v for k, v in module.state_dict().items() if "temp_scale" not in k})
    tau = law.law.log_tau.exp() / torch.tensor(8.0).log()
    torch.testing.assert_close(module(x), by_hand.net(x, tau), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:LearningRateFinder runs before TempScale", "ignore:.*lr_find.*")
@pytest.mark.parametrize("net", ["capped", "timm_vit"])
def test_after_a_tuner(tmp_path: Any, net: str) -> None:
    """Its loop runs, and its file is restored, before anything has been put on: a fit begins as if there were none."""
    results = []
    for tune in (False, True):
        module, t = Classifier(net), trainer(tmp_path, TempScale(tau=0.4, learnable=True))
        if tune:
            Tuner(t).lr_find(module, loader(8), loader(1), min_lr=1e-4, max_lr=1e-2, num_training=4, update_attr=False)
            assert not any(installed(m) for m in module.modules())
        t.fit(module, loader(6), loader(1))
        results.append(module.state_dict())
    assert_equal(results[0], results[1])


@pytest.mark.filterwarnings("ignore:Found 2 module.s. in eval mode")
def test_what_is_in_evaluation_mode_when_a_fit_starts_stays_there(tmp_path: Any) -> None:
    module, modes = capped(), []

    class Modes(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            modes.append((pl_module.net.training, pl_module.net.plain.training))

    module.net.plain.eval()
    trainer(tmp_path, TempScale(tau=0.4), Modes(), max_steps=1).fit(module, loader(1), loader(1))
    assert modes == [(True, False)]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tau": 0.3}, {"tau": 0.3, "learnable": True}, {"tau": 0.3, "transition": 4}])
def test_a_file_is_read_right_or_not_at_all(tmp_path: Any, options: Any) -> None:
    module, t = fitted(tmp_path, **options)
    path = tmp_path / "whole.ckpt"
    t.save_checkpoint(path)
    key = KEY if len(options) == 1 else KEY.replace(".tau", ".log_tau")
    content = torch.load(path, weights_only=True)
    assert set(content["state_dict"]) - set(capped().state_dict()) == {key}
    expected = metrics(tmp_path, module)
    assert expected != metrics(tmp_path, capped_with(content["state_dict"])), "the temperature must be felt"
    # With the callback, with our loader, and the module that was trained: the same numbers. Anything else: an error.
    assert metrics(tmp_path, capped(), TempScale(**options), ckpt_path=path) == expected
    assert metrics(tmp_path, module, TempScale(**options)) == expected
    ours = load_from_checkpoint(Classifier, path)
    assert metrics(tmp_path, ours) == expected
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{key}"'):
        Classifier.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{key}"'):
        metrics(tmp_path, capped(), ckpt_path=path)
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{key}"'):  # not only a Trainer's files
        capped().load_state_dict(module.state_dict())
    # What came out of our loader goes into files as well, without any callback.
    t = trainer(tmp_path, max_steps=1)
    t.fit(ours, loader(1), loader(1))
    t.save_checkpoint(tmp_path / "again.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "again.ckpt")
    assert metrics(tmp_path, again) == metrics(tmp_path, ours)


def capped_with(state: dict[str, Tensor]) -> Classifier:
    module = capped()
    module.load_state_dict(state, strict=False)
    return module


def test_a_module_takes_the_temperature_of_the_file_it_loads(tmp_path: Any) -> None:
    module, t = fitted(tmp_path, tau=0.3)
    t.save_checkpoint(tmp_path / "sharp.ckpt")
    plain = capped()
    t = trainer(tmp_path)
    t.fit(plain, loader(6), loader(1))
    t.save_checkpoint(tmp_path / "plain.ckpt")
    expected = metrics(tmp_path, plain)
    sharp = metrics(tmp_path, module)
    assert metrics(tmp_path, module, ckpt_path=tmp_path / "plain.ckpt") == expected
    assert installed(module.net.attn) is None
    assert metrics(tmp_path, module, ckpt_path=tmp_path / "sharp.ckpt") == sharp
    with pytest.raises(RuntimeError, match=r"another attention temperature: .*0\.3.*in the state dict, .*0\.5"):
        fitted(tmp_path, tau=0.5)[0].load_state_dict(module.state_dict())


def test_a_trained_temperature_is_not_given_twice(tmp_path: Any) -> None:
    module, _ = fitted(tmp_path, tau=0.3)
    with pytest.raises(ValueError, match="another TempScale"):
        trainer(tmp_path, TempScale(tau=0.6)).fit(module, loader(6), loader(1))
    with pytest.raises(ValueError, match="was changed before, when it was trained"):
        apply_temp_scale(module.net, 0.5, next(iter(loader()))[0])


# -- what cannot be right ----------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """Checkpoints its own attention."""

    def __init__(self, wrap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.wrap = nn.Linear(8, 24), wrap

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(q @ k.mT), -1) @ v

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.squeeze(1)).chunk(3, -1)
        return self.wrap(self.attend, *parts) if self.training else self.attend(*parts)


def reentrant(function: Any, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=True)


def modern(function: Any, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


class Own(torch.autograd.Function):
    """With a backward of its own, as hand-written kernels have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.softmax(torch.tanh(q @ k.mT), -1) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            return torch.autograd.grad(torch.softmax(torch.tanh(q @ k.mT), -1) @ v, (q, k, v), grad)


@pytest.mark.parametrize("wrap", [reentrant, modern, lambda function, *args: Own.apply(*args)])
def test_adapters_with_wrong_gradients_are_refused(tmp_path: Any, wrap: Any) -> None:
    module = capped()
    module.net = nn.Sequential(Inside(wrap), nn.Flatten(), nn.Linear(64, 4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(TempScaleError, match=r"wrong in the gradient of 'net.0'.*exclude=\['net.0'\]"):
        trainer(tmp_path, TempScale(tau=0.5)).fit(module, loader(6), loader(1))
    assert_equal(module.state_dict(), before)
    assert installed(module.net[0]) is None


def test_a_compiled_forward_cannot_be_adapted(tmp_path: Any) -> None:
    module = capped()
    module.net.attn.forward = torch.compile(module.net.attn.forward, backend="eager")
    for run in ("fit", "test"):
        t = trainer(tmp_path, TempScale(tau=0.5))
        with pytest.raises(TempScaleError, match=r"'net.attn' was replaced by a compiled function.*module.compile"):
            t.fit(module, loader(6), loader(1)) if run == "fit" else t.test(module, loader(1), verbose=False)


@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
def test_what_is_compiled_already_sees_the_adapter(tmp_path: Any, how: str) -> None:
    module, x = capped(), next(iter(loader()))[0]
    wide = capped().net
    torch.compiler.reset()
    if how == "torch.compile":
        module.net = torch.compile(module.net, backend="aot_eager")
    else:
        module.net.compile(backend="aot_eager")
    module.eval()
    with torch.no_grad():
        plain = module(x)
        torch.testing.assert_close(plain, wide(x))
        change = apply_temp_scale(module.net, 0.2, x)
        assert any("adapter" in text for text in change.targets.values())
        apply_temp_scale(wide, 0.2, x)
        torch.testing.assert_close(module(x), wide(x))
        assert not torch.allclose(module(x), plain)


def test_too_few_trained_weights_for_temperatures_that_move(tmp_path: Any) -> None:
    module = capped(freeze=("embed", "attn", "plain"))
    module.net.head.bias.requires_grad_(False)
    with pytest.raises(TempScaleError, match="every trained weight drives a temperature already"):
        trainer(tmp_path, TempScale(learnable=True)).fit(module, loader(6), loader(1))
    t = trainer(tmp_path, TempScale(tau=0.5))
    t.fit(module, loader(6), loader(1))
    assert [installed(m) is not None for m in (module.net.attn, module.net.plain)] == [True, True]


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_two_processes_learn_what_one_does_on_both_batches(tmp_path: Path) -> None:
    for processes in (1, 2):
        ended = forked(SCRIPT, tmp_path, processes, processes=processes)
        assert ended.code == 0, ended.output
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2))
    learned = one[KEY.replace(".tau", ".log_tau")].exp()
    assert len(set(learned.tolist())) == 2
    assert (learned - 0.5).abs().min() > 1e-4
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9, msg=name)
